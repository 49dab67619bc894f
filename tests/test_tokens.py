"""Tokens and labels: the references are the tokenizers, called plainly, and a model's own loss."""

import hashlib
import struct

import pytest

from lorabench import data
from lorabench.config import ConfigErrors, DataConfig
from lorabench.zoo import TINY_GEMMA


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_GEMMA)


def examples(*pairs):
    return [data.Example(*pair, id=str(i)) for i, pair in enumerate(pairs)]


def config(**kwargs):
    return DataConfig(**{"name": "t", "source": "jsonl", "max_length": 64, **kwargs})


def plainly(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("add_eos", [True, False])
def test_bos_eos_and_the_boundary(tokenizer, add_bos, add_eos):
    pairs = examples(("rev:hello=", "olleh"), ("a=", "b"))
    tokens = data.tokenise(pairs, tokenizer, config(add_bos=add_bos, add_eos=add_eos))
    for pair, ids, start in zip(pairs, tokens.input_ids, tokens.completion_start, strict=True):
        bos = [tokenizer.bos_token_id] * add_bos
        eos = [tokenizer.eos_token_id] * add_eos
        assert ids[:start] == bos + plainly(tokenizer, pair.prompt)
        assert ids[start:] == plainly(tokenizer, pair.completion) + eos
        if add_bos:  # as the tokenizer itself opens a text
            assert ids[:start] == tokenizer(pair.prompt)["input_ids"]
    assert tokens.ids == ["0", "1"] and tokens.indices == [0, 1] and len(tokens) == 2


def test_bos_is_not_doubled(tokenizer):
    tokens = data.tokenise(examples(("<bos>a=", "b")), tokenizer, config())
    assert tokens.input_ids[0] == [*plainly(tokenizer, "<bos>a=b"), tokenizer.eos_token_id]
    assert tokens.input_ids[0].count(tokenizer.bos_token_id) == 1


def words(opens_with_bos, **special):
    """A word-level tokenizer that adds BOS, as Llama's and Gemma's, or only has one, as GPT-2's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "a", "b", "<unk>"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if opens_with_bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **special
    )


@pytest.mark.parametrize("adds", [True, False])
def test_bos_where_the_tokenizer_adds_it(adds):
    """A model that never saw BOS at the start of a text scores worse with one."""
    tokenizer = words(adds)
    assert tokenizer.bos_token_id == 0 and data.opens_with_bos(tokenizer) == adds
    tokens = data.tokenise(examples(("a a", "b"), ("<s> a", "b")), tokenizer, config())
    assert tokens.input_ids[0] == [*tokenizer("a a")["input_ids"], 3, 1]
    assert tokens.input_ids[1] == [0, 2, 3, 1]  # written by the user: never doubled, never lost
    without = data.tokenise(examples(("a a", "b")), tokenizer, config(add_bos=False))
    assert without.input_ids == [[2, 2, 3, 1]]


def test_gpt2_has_a_bos_token_and_adds_none(tmp_path):
    """Transformers' own class, on which the error was made."""
    import json

    from transformers import GPT2Tokenizer

    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "=": 3}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = GPT2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert tokenizer.bos_token_id is not None and tokenizer("a=")["input_ids"] == [1, 3]
    tokens = data.tokenise(examples(("a=", "b")), tokenizer, config())
    assert tokens.input_ids == [[1, 3, 2, tokenizer.eos_token_id]]


@pytest.mark.parametrize("adds", [True, False])
def test_a_chat_templates_bos_is_not_doubled(adds):
    template = (
        "{{ bos_token }} {{ messages[0]['content'] }} "
        "{% if not add_generation_prompt %}{{ messages[1]['content'] }}{% endif %}"
    )
    tokenizer = words(adds, chat_template=template)
    tokens = data.tokenise(examples(("a", "b")), tokenizer, config(chat_template=True))
    assert tokens.input_ids == [[0, 2, 3, 1]] and tokens.completion_start == [2]


def test_the_embedded_base_opens_with_bos(tokenizer):
    """It was trained so; its published numbers hold only with it."""
    assert data.opens_with_bos(tokenizer)


def bpe(**special):
    """A tokenizer that knows '=5' as one token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["2", "=", "5", "=5", "<e>"])}
    model = models.BPE(vocab=vocabulary, merges=[("=", "5")])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **special)


def test_no_token_spans_prompt_and_completion():
    tokenizer = bpe(eos_token="<e>")
    assert plainly(tokenizer, "2=5") == [0, 3]  # together
    tokens = data.tokenise(examples(("2=", "5")), tokenizer, config())  # it has no BOS
    assert tokens.input_ids == [[0, 1, 2, 4]] and tokens.completion_start == [2]


def test_no_eos_is_refused():
    with pytest.raises(ConfigErrors, match=r"^data\.add_eos: must be false with a tokenizer that"):
        data.tokenise(examples(("2=", "5")), bpe(), config())
    tokens = data.tokenise(examples(("2=", "5")), bpe(), config(add_eos=False))
    assert tokens.input_ids == [[0, 1, 2]]


def test_too_long_and_empty_are_left_out_never_cut(tokenizer):
    pairs = examples(("abc", "d"), ("abc", "de"), ("abc", "def"), ("a", ""), ("a", "b"))
    tokens = data.tokenise(pairs, tokenizer, config(max_length=7))  # <bos> abc de <eos>
    assert tokens.indices == [0, 1, 4] and tokens.ids == ["0", "1", "4"]
    assert tokens.num_too_long == 1 and tokens.num_empty == 1
    assert tokens.notes("test", config(max_length=7)) == [
        "data.test: 3 of 5 examples are left; 1 were left out because they are longer than "
        "data.max_length=7 tokens; data.max_length=8 would keep them all",
        "data.test: 1 of 5 examples were left out because their completion gives no token; fill it "
        "in, or remove them",
    ]
    assert tokens.first(1).notes("test", config(max_length=7)) == tokens.notes(
        "test", config(max_length=7)
    )
    whole = data.tokenise(pairs[:4], tokenizer, config(max_length=8))
    assert whole.num_too_long == 0 and not data.tokenise(pairs[:3], tokenizer, config()).notes(
        "test", config()
    )
    assert max(map(len, tokens.input_ids)) == 7
    with pytest.raises(
        ConfigErrors,
        match=r"^data\.max_length: must let at least one of 5 examples "
        r"through; got 3, the shortest has 4 tokens; raise data\.max_length$",
    ):
        data.tokenise(pairs, tokenizer, config(max_length=3))


def test_empty_prompt_needs_a_bos(tokenizer):
    tokens = data.tokenise(examples(("", "b")), tokenizer, config())
    assert tokens.completion_start == [1]
    with pytest.raises(ConfigErrors, match=r"^data\.prompt: must give at least one token"):
        data.tokenise(examples(("", "b")), tokenizer, config(add_bos=False))


def test_labels_are_those_hugging_face_expects(tokenizer):
    """Its own loss on our labels is the mean over the completion's tokens, predicted from t - 1."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY_GEMMA).eval()
    pairs = examples(("rev:hello=", "olleh"), ("copy:abc=", "abd"))
    tokens = data.tokenise(pairs, tokenizer, config())
    arrays_BT = data.batch(tokens, [0, 1], 24, data.pad_id(tokenizer))
    ids_BT, labels_BT = map(torch.from_numpy, arrays_BT)
    with torch.no_grad():
        loss = model(input_ids=ids_BT, labels=labels_BT).loss
        losses = []
        for ids, start in zip(tokens.input_ids, tokens.completion_start, strict=True):  # unpadded
            logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            losses += [-logs[t - 1, ids[t]] for t in range(start, len(ids))]
    # float32 sums in another order
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


def test_hash_is_of_the_tokens_alone(tokenizer):
    """Another boundary, id, label or order of the same numbers is another training set."""

    def made(ids, starts, label_ids=()):
        count = len(ids)
        return data.Tokens.of(ids, starts, ids=[""] * count, label_ids=list(label_ids))

    numbers = [2, 3, 5, 6, 7, 2, 8, 9, 2, 1, 0]  # 2 examples; each length and ids; starts; labels
    expected = hashlib.sha256(struct.pack(f"<{len(numbers)}q", *numbers)).hexdigest()
    assert made([[5, 6, 7], [8, 9]], [2, 1]).hash() == expected
    others = [
        made([[5, 6], [7, 8, 9]], [2, 1]),
        made([[5, 6, 7], [8, 9]], [1, 2]),
        made([[8, 9], [5, 6, 7]], [2, 1]),
        made([[5, 6, 7], [8, 9]], [2, 1], [0, 1]),
        made([[5, 6, 7], [8, 9]], [2, 1], [1, 0]),
    ]
    assert len({expected, *(tokens.hash() for tokens in others)}) == 6
    tokens = data.tokenise(examples(("a", "b"), ("c", "d")), tokenizer, config())
    renamed = data.tokenise(examples(("a", "b"), ("c", "d"), ("e", "")), tokenizer, config())
    assert tokens.hash() == renamed.hash() != tokens.first(1).hash()


def test_pad_id(tokenizer):
    assert data.pad_id(tokenizer) == tokenizer.pad_token_id == 0
    assert data.pad_id(bpe(eos_token="<e>")) == 4
    assert data.pad_id(bpe()) == 0
