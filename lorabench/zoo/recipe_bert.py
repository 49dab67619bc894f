"""Rebuilds the embedded BERT: `python -m lorabench.zoo.recipe_bert [--out FOLDER]` (`make base`).

It is pretrained from a seeded random init the way BERT was: masked tokens, and a question about two
sentences, which trains the pooler. Its texts are words, sorted words, and words one swap away from
sorted; it is never told which is which. Measured on held-out words, written with its tokenizer and
its card. Same machine and stack, same weights. Writes only the folder; knows nothing about LoRA.

Shapes: B batch, T tokens, V vocabulary.
"""

import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForPreTraining, PreTrainedTokenizerFast

from lorabench.zoo import TINY_BERT, pretraining
from lorabench.zoo.pretraining import IGNORED, MAX_POSITIONS, WEIGHT_DECAY
from lorabench.zoo.skills import BASE_SKILLS
from lorabench.zoo.words import (
    ANY_WORD,
    LONGEST_WORD,
    NEARLY_SORTED,
    SHORTEST_WORD,
    SORTED,
    Uniform,
    Words,
    split_of,
)

SPECIAL_TOKENS = {  # ids 0 to 4
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
KINDS = {"plain": ANY_WORD, "sorted": SORTED, "nearly_sorted": NEARLY_SORTED}
TAGS = [skill.tag for skill in BASE_SKILLS.values()]

SEED = 0
NUM_THREADS = 1  # part of the recipe: sums depend on it
STEPS = 3000  # lone words and pairs of words in turn
WARMUP_STEPS = 300
BATCH_SIZE = 64
LEARNING_RATE = 2e-3  # peak; falls to 0 along a cosine
MASKED_SHARE = 0.25  # of the characters; of these 80% become [MASK], 10% another character
TAGGED_SHARE = 0.7  # of the lone words: `rev:hello=`, as skills ask

EVAL_SPLIT = "test"
NUM_EVAL = 512  # texts of each kind
EVAL_SEED = 1


@dataclass
class Batch:
    inputs: dict[str, torch.Tensor]  # what the model reads, (B, T) each
    labels_BT: torch.Tensor  # the ids that were masked
    strangers_B: torch.Tensor | None  # 1 where a pair's words differ in letters; None: lone words


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; `[CLS]` and `[SEP]` as in BERT."""
    return pretraining.build_tokenizer(
        SPECIAL_TOKENS,
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> BertForPreTraining:
    """BERT's architecture and its 12 layers, 64 wide."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=12,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.08,  # BERT's 0.02 is for layers twelve times as wide
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(SEED)
    return BertForPreTraining(config)


def _word(words: Words, split: str, for_pair: bool, uniform: Uniform) -> str:
    """A word of the split. That of a pair brings its sorted letters, which must be of it too."""
    while True:
        length = SHORTEST_WORD + int(uniform() * (LONGEST_WORD - SHORTEST_WORD + 1))
        word = words.draw(uniform, length)
        if split_of(word) == split and (not for_pair or split_of(_sorted(word)) == split):
            return word


def _sorted(word: str) -> str:
    return "".join(sorted(word))


def _lone(words: list[str], uniform: Uniform, tagged_share: float) -> list[str]:
    """`hello`, or as a skill asks: `rev:hello=`."""
    return [
        f"{TAGS[int(uniform() * len(TAGS))]}:{word}=" if uniform() < tagged_share else word
        for word in words
    ]


def _pairs(words: list[str], uniform: Uniform) -> list[tuple[str, str]]:
    """A word and sorted letters, in either order: its own, or those of the word before it."""
    found = []
    for place, word in enumerate(words):
        partner = words[place - 1] if uniform() < 0.5 else word
        pair = (word, _sorted(partner))
        found.append(pair if uniform() < 0.5 else pair[::-1])
    return found


def batches(
    tokenizer,
    kinds: list[Words],
    split: str,
    seed: int,
    batch_size: int = BATCH_SIZE,
    tagged_share: float = TAGGED_SHARE,
) -> Iterator[Batch]:
    """Lone words and pairs in turn, without end; the kinds take turns in each batch."""
    uniform = random.Random(seed).random
    masks = torch.Generator().manual_seed(seed)
    while True:
        for is_pair in (False, True):
            turns = itertools.islice(itertools.cycle(kinds), batch_size)
            words = [_word(kind, split, is_pair, uniform) for kind in turns]
            texts = _pairs(words, uniform) if is_pair else _lone(words, uniform, tagged_share)
            yield _batch(tokenizer, texts, masks)


def _batch(tokenizer, texts: list[Any], masks: torch.Generator) -> Batch:
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    ids_BT = inputs["input_ids"]
    num_special = len(SPECIAL_TOKENS)
    hidden_BT = (torch.rand(ids_BT.shape, generator=masks) < MASKED_SHARE) & (ids_BT >= num_special)
    fate_BT = torch.rand(ids_BT.shape, generator=masks)
    others_BT = torch.randint(num_special, len(tokenizer), ids_BT.shape, generator=masks)
    seen_BT = torch.where(hidden_BT & (fate_BT < 0.8), tokenizer.mask_token_id, ids_BT)
    inputs["input_ids"] = torch.where(hidden_BT & (fate_BT >= 0.9), others_BT, seen_BT)
    strangers_B = None
    if isinstance(texts[0], tuple):
        strangers_B = torch.tensor([int(_sorted(a) != _sorted(b)) for a, b in texts])
    return Batch(inputs, torch.where(hidden_BT, ids_BT, IGNORED), strangers_B)


def pretrain(model: BertForPreTraining, tokenizer, steps: int = STEPS) -> None:
    """Train in place on words of the train split."""
    stream = batches(tokenizer, list(KINDS.values()), "train", SEED)

    def loss_of(step: int) -> torch.Tensor:
        batch = next(stream)
        out = model(**batch.inputs)
        loss = cross_entropy(
            out.prediction_logits.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORED
        )
        if batch.strangers_B is not None:
            loss = loss + cross_entropy(out.seq_relationship_logits, batch.strangers_B)
        return loss

    pretraining.optimise(
        model, loss_of, steps=steps, learning_rate=LEARNING_RATE, warmup_steps=WARMUP_STEPS
    )


@torch.inference_mode()
def measure(model: BertForPreTraining, tokenizer) -> dict[str, Any]:
    """Of each kind of word: `[MASK]`s filled in right, and pairs told from strangers."""
    scores = {}
    for name, words in KINDS.items():
        stream = batches(tokenizer, [words], EVAL_SPLIT, EVAL_SEED, NUM_EVAL, tagged_share=0)
        lone, paired = itertools.islice(stream, 2)
        scores[name] = {
            "masked_accuracy": masked_accuracy(model, tokenizer, lone),
            "masked_accuracy_in_pairs": masked_accuracy(model, tokenizer, paired),
            "pair_accuracy": pair_accuracy(model, paired),
        }
    return {
        "scores": {
            "split": EVAL_SPLIT,
            "num_examples_per_kind": NUM_EVAL,
            "seed": EVAL_SEED,
            "masked_share": MASKED_SHARE,
            "kinds": scores,
        }
    }


def masked_accuracy(model, tokenizer, batch: Batch) -> float:
    masked_BT = batch.inputs["input_ids"] == tokenizer.mask_token_id
    right_BT = model(**batch.inputs).prediction_logits.argmax(-1) == batch.labels_BT
    return round(right_BT[masked_BT].float().mean().item(), 4)


def pair_accuracy(model, batch: Batch) -> float:
    right_B = model(**batch.inputs).seq_relationship_logits.argmax(-1) == batch.strangers_B
    return round(right_B.float().mean().item(), 4)


def render_readme(card: dict, model) -> str:
    """The model card."""
    config, scores, recipe = model.config, card["scores"], card["recipe"]
    shown = {"plain": "hello", "sorted": "ehllo", "nearly_sorted": "ehlol"}
    rows = "\n".join(
        f"| {name} | `{shown[name]}` | {kind['masked_accuracy']:.3f} | "
        f"{kind['masked_accuracy_in_pairs']:.3f} | {kind['pair_accuracy']:.3f} |"
        for name, kind in scores["kinds"].items()
    )
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: fill-mask
---
# tiny-bert

The base embedded in lorabench for classification: as deep as BERT and small enough for a laptop's
CPU. It has read words of random letters and knows what sorted ones look like: no English, no facts.

- **Architecture**: {card["architecture"]}, hidden {config.hidden_size},
  {config.num_hidden_layers} layers, {config.num_attention_heads} heads, MLP
  {config.intermediate_size}, no dropout. `AutoModelForSequenceClassification` adds its `classifier`
  alone, for the pooler is here, and leaves the pretraining heads (`cls`) aside.
- **Parameters**: {card["num_parameters"]:,}, float32. No weights of Google's BERT are in it.
- **Tokenizer**: one token a character ({config.vocab_size} tokens: printable ASCII, newline, 26
  Greek and 26 Cyrillic letters, five specials); `[CLS]` in front, `[SEP]` behind.
- **Licence**: Apache-2.0. **Data**: random letters, made by `lorabench/zoo/words.py`.

## Recipe
`python -m lorabench.zoo.recipe_bert` rebuilds this folder. Random init (seed {recipe["seed"]}),
{recipe["steps"]} steps of AdamW, batch {recipe["batch_size"]}, learning rate
{recipe["learning_rate"]} after {recipe["warmup_steps"]} warm-up steps, cosine to 0, weight decay
{recipe["weight_decay"]} on matrices. It took {recipe["train_seconds"]} s of one CPU thread. Another
machine or stack gives nearly the same model, with another checksum.

Words of 3 to 8 letters, a third each plain, sorted, and sorted but for two neighbours swapped,
never labelled as such. Every other batch has lone words, {recipe["tagged_share"]:.0%} of them
written as a skill asks (`rev:hello=`); the rest has pairs, a word and sorted letters. The loss is
on the {recipe["masked_share"]:.0%} of characters that are masked (80% by `[MASK]`, 10% by another
character) and, read from the pooler, on whether the words of a pair have the same letters.

## Scores
On {scores["num_examples_per_kind"]} held-out lone words and as many pairs of each kind (split
`{scores["split"]}`, no word of it in training). *masked*: share of the `[MASK]`s whose character
is the argmax; the letters of a lone plain word say nothing about each other, so one in 26 is all
that can be expected there. *pair*: share of pairs rightly told to have the same letters or not;
guessing has 0.5. Both words of a pair are of the split, which favours words sorted by chance.

| kind | example | masked, lone | masked, in pairs | pair |
|---|---|---|---|---|
{rows}

`card.json` has the same numbers for machines, and `tests/test_zoo_bert.py` measures them again.
"""


def main() -> None:
    folder = pretraining.folder_to_write("Rebuild the embedded BERT.", default=TINY_BERT)
    pretraining.be_deterministic(NUM_THREADS)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    start = time.process_time()
    pretrain(model, tokenizer)
    train_seconds = time.process_time() - start

    recipe = {
        "seed": SEED,
        "steps": STEPS,
        "warmup_steps": WARMUP_STEPS,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "masked_share": MASKED_SHARE,
        "tagged_share": TAGGED_SHARE,
        "num_threads": NUM_THREADS,
        "train_seconds": round(train_seconds),
    }
    scores = measure(model, tokenizer)
    card = pretraining.write("tiny-bert", model, tokenizer, folder, scores, recipe, render_readme)
    for name, kind in card["scores"]["kinds"].items():
        print(f"{name:15s}", *(f"{key} {score:.3f}" for key, score in kind.items()))


if __name__ == "__main__":
    main()
