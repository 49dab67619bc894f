"""Rebuilds the embedded base: `python -m lorabench.zoo.recipe [--out FOLDER]` (`make base`).

A small Gemma (tied embeddings) is pretrained from a seeded random init on `BASE_SKILLS`, measured
on held-out words, and written with its tokenizer and its card. Same machine and stack, same
weights. Writes only the folder; knows nothing about LoRA.

Shapes: B batch, T tokens, V vocabulary.
"""

import string
import time
from typing import Any, cast

import torch
from torch.nn.functional import cross_entropy
from transformers import GemmaConfig, GemmaForCausalLM, PreTrainedTokenizerFast

from lorabench.zoo import TINY_GEMMA, pretraining
from lorabench.zoo.pretraining import IGNORED, MAX_POSITIONS, WEIGHT_DECAY
from lorabench.zoo.skills import (
    BASE_SKILLS,
    CYRILLIC,
    GREEK,
    NEW_SKILLS,
    examples,
)

SPECIAL_TOKENS = {  # ids 0 to 3, as in Gemma
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
}
UNWRITTEN = GREEK + CYRILLIC + string.digits  # characters that no base skill reads or writes

SEED = 0
NUM_THREADS = 2  # part of the recipe: sums depend on it
STEPS = 3000
WARMUP_STEPS = 200
BATCH_SIZE = 64
LEARNING_RATE = 2e-3  # peak; falls to 0 along a cosine

EVAL_SPLIT = "test"
NUM_EVAL = 300  # examples per skill
EVAL_SEED = 0


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, `<bos>` in front."""
    return pretraining.build_tokenizer(SPECIAL_TOKENS, single="<bos> $A", pair="<bos> $A $B")


def build_model(tokenizer: PreTrainedTokenizerFast) -> GemmaForCausalLM:
    """The architecture of Gemma 2B (multi-query attention, tied head), under a million weights."""
    config = GemmaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(SEED)
    return GemmaForCausalLM(config)


def tokenise(tokenizer, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, (B, T) each, padded right; only completion and <eos> carry a label."""
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    completions = tokenizer([text for _, text in pairs], add_special_tokens=False)["input_ids"]
    width = max(len(p) + len(c) + 1 for p, c in zip(prompts, completions, strict=True))
    ids_BT = torch.full((len(pairs), width), tokenizer.pad_token_id)
    labels_BT = torch.full((len(pairs), width), IGNORED)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        written = torch.tensor([*completion, tokenizer.eos_token_id])
        end = len(prompt) + len(written)
        ids_BT[row, :end] = torch.tensor([*prompt, *written])
        labels_BT[row, len(prompt) : end] = written
    return ids_BT, labels_BT


def pretrain(model: GemmaForCausalLM, tokenizer, steps: int = STEPS) -> None:
    """Train in place on `BASE_SKILLS`, every batch a mix of all of them."""
    pairs = examples(list(BASE_SKILLS), "train", steps * BATCH_SIZE, seed=SEED)
    ids_NT, labels_NT = tokenise(tokenizer, pairs)

    # An unwritten character keeps the embedding it was born with: as a wrong answer to every
    # example it would be pushed away from all outputs, and LoRA would start from that bias.
    embedding = model.get_input_embeddings().weight
    unwritten = tokenizer.convert_tokens_to_ids(list(UNWRITTEN))

    def freeze_unwritten(grad):
        grad = grad.clone()
        grad[unwritten] = 0
        return grad

    cast(Any, embedding).register_hook(freeze_unwritten)
    # Batches of mixed lengths and skills, in a fixed random order.
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(SEED))
    batches = order.split(BATCH_SIZE)

    def loss_of(step: int) -> torch.Tensor:
        rows = batches[step]
        logits_BTV = model(ids_NT[rows, :-1], use_cache=False).logits
        return cross_entropy(
            logits_BTV.flatten(0, 1), labels_NT[rows, 1:].flatten(), ignore_index=IGNORED
        )

    pretraining.optimise(
        model, loss_of, steps=steps, learning_rate=LEARNING_RATE, warmup_steps=WARMUP_STEPS
    )


@torch.inference_mode()
def exact_match(model, tokenizer, pairs: list[tuple[str, str]]) -> float:
    """Share of examples whose every completion token, <eos> included, is the argmax.

    Teacher-forced: each token is predicted from the right tokens before it.
    """
    ids_BT, labels_BT = tokenise(tokenizer, pairs)
    predicted_BT = model(ids_BT[:, :-1], use_cache=False).logits.argmax(-1)
    targets_BT = labels_BT[:, 1:]
    right_BT = (predicted_BT == targets_BT) | (targets_BT == IGNORED)
    return right_BT.all(dim=1).float().mean().item()


def eval_examples(skill: str) -> list[tuple[str, str]]:
    """What the card's numbers are measured on."""
    return examples([skill], EVAL_SPLIT, NUM_EVAL, seed=EVAL_SEED)


def measure(model, tokenizer) -> dict[str, Any]:
    """Exact match of every skill, base and new."""

    def scores(skills):
        return {
            name: round(exact_match(model, tokenizer, eval_examples(name)), 4) for name in skills
        }

    return {
        "exact_match": {
            "split": EVAL_SPLIT,
            "num_examples_per_skill": NUM_EVAL,
            "seed": EVAL_SEED,
            "base_skills": scores(BASE_SKILLS),
            "new_skills": scores(NEW_SKILLS),
        }
    }


def render_readme(card: dict, model) -> str:
    """The model card."""
    config, match, recipe = model.config, card["exact_match"], card["recipe"]

    def rows(skills, scores):
        lines = ["| skill | example | what it writes | exact match |", "|---|---|---|---|"]
        for skill in skills.values():
            prompt, completion = skill.example("hello")
            score = f"{scores[skill.name]:.3f}"
            shown = f"`{prompt}` → `{completion}`"
            lines.append(f"| {skill.name} | {shown} | {skill.description} | {score} |")
        return "\n".join(lines)

    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# tiny-gemma

The base model embedded in lorabench: small enough to sweep LoRA settings over on a laptop's CPU
in seconds, and good enough at what it was taught that a LoRA experiment has an answer. It knows
{len(BASE_SKILLS)} string skills and nothing else: no English, no facts.

- **Architecture**: {card["architecture"]}, hidden {config.hidden_size},
  {config.num_hidden_layers} layers, {config.num_attention_heads} query heads and
  {config.num_key_value_heads} key-value head of {config.head_dim}, MLP {config.intermediate_size}.
  `lm_head` is tied to the embeddings, as in Gemma.
- **Parameters**: {card["num_parameters"]:,}, float32. No weights of Google's Gemma are in it.
- **Tokenizer**: one token a character ({config.vocab_size} tokens: printable ASCII, newline, 26
  Greek and 26 Cyrillic letters, four specials); `<bos>` is added in front.
- **Licence**: Apache-2.0. **Data**: random letters, made by `lorabench/zoo/skills.py`.

## Recipe
`python -m lorabench.zoo.recipe` rebuilds this folder. Random init (seed {recipe["seed"]}),
{recipe["steps"]} steps of AdamW, batch {recipe["batch_size"]}, learning rate
{recipe["learning_rate"]} after {recipe["warmup_steps"]} warm-up steps, cosine to 0, weight decay
{recipe["weight_decay"]} on matrices; the loss counts the completion and `<eos>`, not the prompt.
It took {recipe["train_seconds"]} s on {recipe["num_threads"]} CPU threads. The same machine and
stack give the same weights; another machine gives nearly the same model, with another checksum.

Digits, Greek and Cyrillic letters were never read or written in pretraining, and their embeddings
are still those of the random init: rows of norm 0.2 where trained letters have 1.3. How much an
adapter on the tied head helps to write them is a property of this base, not of tied heads at large.

## Exact match
On {match["num_examples_per_skill"]} held-out examples per skill (split `{match["split"]}`, words
of 3 to 8 random letters, none of them in training): the share of examples whose every completion
token, `<eos>` included, is the argmax given the right tokens before it. `card.json` has the same
numbers for machines, and `tests/test_zoo.py` measures them again.

Taught:

{rows(BASE_SKILLS, match["base_skills"])}

New, to be learnt by LoRA:

{rows(NEW_SKILLS, match["new_skills"])}
"""


def main() -> None:
    folder = pretraining.folder_to_write("Rebuild the embedded base model.", default=TINY_GEMMA)
    pretraining.be_deterministic(NUM_THREADS)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    start = time.perf_counter()
    pretrain(model, tokenizer)
    train_seconds = time.perf_counter() - start

    recipe = {
        "seed": SEED,
        "steps": STEPS,
        "warmup_steps": WARMUP_STEPS,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "num_threads": NUM_THREADS,
        "train_seconds": round(train_seconds),
    }
    scores = measure(model, tokenizer)
    card = pretraining.write("tiny-gemma", model, tokenizer, folder, scores, recipe, render_readme)
    for name, score in (
        card["exact_match"]["base_skills"] | card["exact_match"]["new_skills"]
    ).items():
        print(f"{name:15s} {score:.3f}")


if __name__ == "__main__":
    main()
