"""The embedded BERT: its tokenizer, its checkpoint, its card, its recipe, and what it is for."""

import hashlib
import itertools
import json
import string

import pytest
import torch
from processes import start_call

from lorabench.zoo import TINY_BERT, recipe_bert
from lorabench.zoo.skills import examples
from lorabench.zoo.words import split_of


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_BERT, local_files_only=True)


@pytest.fixture(scope="module")
def card():
    return json.loads((TINY_BERT / "card.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "text",
    ["asc:ehllo=", "  two  spaces , and . marks !", "αβγ ϝϙω щшч", string.printable[:95], "\n "],
)
def test_tokenizer_round_trip(text, tokenizer):
    ids = tokenizer(text)["input_ids"]
    assert [ids[0], ids[-1]] == [tokenizer.cls_token_id, tokenizer.sep_token_id]
    assert len(ids) == len(text) + 2 and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_tokenizer_speaks_as_berts_does(tokenizer):
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokenizer.convert_tokens_to_ids(specials) == list(range(5))
    assert tokenizer.all_special_tokens and set(tokenizer.all_special_tokens) == set(specials)
    batch = tokenizer(["ab", "a"], ["c", "de"], padding=True)
    assert tokenizer.batch_decode(batch["input_ids"]) == [
        "[CLS]ab[SEP]c[SEP]",
        "[CLS]a[SEP]de[SEP]",
    ]
    assert batch["token_type_ids"] == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert tokenizer(["ab", "a"], padding=True)["attention_mask"] == [[1] * 4, [1, 1, 1, 0]]
    assert tokenizer("日", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]


def test_checkpoint_misses_the_classifier_alone(tokenizer, card):
    from transformers import AutoModelForPreTraining, AutoModelForSequenceClassification

    model, info = AutoModelForSequenceClassification.from_pretrained(
        TINY_BERT, local_files_only=True, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert all(key.startswith("cls.") for key in info["unexpected_keys"])  # pretraining heads
    assert not info["mismatched_keys"]
    assert model.config.model_type == "bert" and model.config.num_hidden_layers == 12
    assert model.dtype == torch.float32 and model.config.vocab_size == len(tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id

    whole, info = AutoModelForPreTraining.from_pretrained(
        TINY_BERT, local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert whole.num_parameters() == card["num_parameters"] < 650_000
    weights = (TINY_BERT / "model.safetensors").read_bytes()
    assert len(weights) < 3_000_000
    assert hashlib.sha256(weights).hexdigest() == card["weights_sha256"]


@pytest.mark.slow
@torch.inference_mode()
def test_card_states_what_the_weights_do(tokenizer, card):
    """Measured through the classes that others would load for each pretraining head."""
    from transformers import AutoModelForMaskedLM, AutoModelForNextSentencePrediction

    fill = AutoModelForMaskedLM.from_pretrained(TINY_BERT, local_files_only=True).eval()
    pairs = AutoModelForNextSentencePrediction.from_pretrained(TINY_BERT, local_files_only=True)
    pairs.eval()
    scores = card["scores"]
    assert scores["kinds"].keys() == recipe_bert.KINDS.keys()
    for name, stated in scores["kinds"].items():
        stream = recipe_bert.batches(
            tokenizer,
            [recipe_bert.KINDS[name]],
            scores["split"],
            scores["seed"],
            scores["num_examples_per_kind"],
            tagged_share=0,
        )
        for key, batch in zip(
            ("masked_accuracy", "masked_accuracy_in_pairs"), stream, strict=False
        ):
            predicted = fill(**batch.inputs).logits.argmax(-1)
            masked = batch.inputs["input_ids"] == tokenizer.mask_token_id
            found = (predicted == batch.labels_BT)[masked].float().mean()
            # Another machine's rounding may turn a prediction or two of a thousand.
            assert found.item() == pytest.approx(stated[key], abs=0.002), (name, key)
        predicted = pairs(**batch.inputs).logits.argmax(-1)
        found = (predicted == batch.strangers_B).float().mean().item()
        assert found == pytest.approx(stated["pair_accuracy"], abs=0.005), name
        # What it is for: more than guessing, where there is something to know.
        assert stated["pair_accuracy"] > 0.9 and stated["masked_accuracy_in_pairs"] > 0.2
    plain, ordered = scores["kinds"]["plain"], scores["kinds"]["sorted"]
    assert ordered["masked_accuracy"] > 2 * plain["masked_accuracy"]


def test_readme_states_the_cards_numbers(card):
    readme = (TINY_BERT / "README.md").read_text(encoding="utf-8")
    for name, stated in card["scores"]["kinds"].items():
        row = next(line for line in readme.splitlines() if line.startswith(f"| {name} |"))
        assert row.endswith("| " + " | ".join(f"{score:.3f}" for score in stated.values()) + " |")
    assert f"{card['num_parameters']:,}" in readme


# The recipe


def test_pretraining_reads_train_words_and_labels_what_it_masks(tokenizer):
    stream = recipe_bert.batches(tokenizer, list(recipe_bert.KINDS.values()), "train", seed=5)
    num_masked = num_characters = 0
    for batch in itertools.islice(stream, 6):
        ids = batch.inputs["input_ids"]
        masked = batch.labels_BT >= 0
        truth = torch.where(masked, batch.labels_BT, ids)
        num_masked += masked.sum().item()
        num_characters += (truth >= 5).sum().item()
        assert not masked[truth < 5].any()  # no special token
        shares = [(ids[masked] == 4), (ids[masked] == truth[masked])]
        # Four standard deviations of about 190 draws or more, of 80% and 10%.
        assert shares[0].float().mean().item() == pytest.approx(0.8, abs=0.12)
        assert shares[1].float().mean().item() == pytest.approx(0.1, abs=0.09)
        for row, text in enumerate(tokenizer.batch_decode(truth)):
            words = text.removeprefix("[CLS]").split("[SEP]")[:-1]
            words = [word.split(":")[-1].rstrip("=") for word in words]
            assert {split_of(word) for word in words} == {"train"}
            if batch.strangers_B is None:
                assert len(words) == 1
            else:
                same = sorted(words[0]) == sorted(words[1])
                assert batch.strangers_B[row] == (not same)
    assert num_masked / num_characters == pytest.approx(recipe_bert.MASKED_SHARE, abs=0.03)


def test_pretraining_does_not_depend_on_the_hash_seed(elsewhere, tmp_path):
    code = (
        "import hashlib, sys; from lorabench.zoo import pretraining, recipe_bert as r;"
        "pretraining.be_deterministic(r.NUM_THREADS);"
        "t = r.build_tokenizer(); m = r.build_model(t); r.pretrain(m, t, steps=4);"
        "state = sorted(m.state_dict().items());"
        "data = b''.join(n.encode() + w.numpy().tobytes() for n, w in state);"
        "print(hash('text'), hashlib.sha256(data).hexdigest())"
    )
    forked = start_call(tmp_path, lambda: exec(code, {}) or 0)  # has the hash seed of this process
    written = [elsewhere.run(code)]
    assert forked.wait() == 0, forked.said
    written.append(forked.said)
    (here, mine), (there, theirs) = (text.split()[-2:] for text in written)
    assert here != there, "two hash seeds"
    assert mine == theirs and len(mine) == 64


# The use


def lora_accuracy(model, tokenizer, steps=300, batch_size=16):
    """Share of 512 test words whose sortedness a stock PEFT LoRA tells after `steps`."""
    from peft import LoraConfig, get_peft_model

    def encode(pairs):
        inputs = tokenizer([prompt for prompt, _ in pairs], padding=True, return_tensors="pt")
        return inputs, torch.tensor([int(label == "yes") for _, label in pairs])

    torch.manual_seed(0)  # of LoRA's A
    config = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules=["query", "value"])
    model = get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    train = examples(["is_sorted"], "train", steps * batch_size)
    for step in range(steps):
        inputs, labels = encode(train[step * batch_size : (step + 1) * batch_size])
        torch.nn.functional.cross_entropy(model(**inputs).logits, labels).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.eval()
    inputs, labels = encode(examples(["is_sorted"], "test", 512))
    with torch.inference_mode():
        return (model(**inputs).logits.argmax(-1) == labels).float().mean().item()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # within PEFT
def test_a_lora_learns_from_the_base_what_it_does_not_from_random_weights(tokenizer):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(TINY_BERT, local_files_only=True)
    torch.manual_seed(0)
    random = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(TINY_BERT))
    found, baseline = lora_accuracy(base, tokenizer), lora_accuracy(random, tokenizer)
    print(f"is_sorted: {found:.3f} from the base, {baseline:.3f} from random weights")
    assert found > 0.8 and baseline < 0.6  # guessing: 0.5, give or take 0.022
