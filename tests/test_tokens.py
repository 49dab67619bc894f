"""Tokens and labels: the references are the tokenizers, called plainly, and a model's own loss."""

import pytest

from lorabench import data
from lorabench.config import ConfigErrors, DataConfig
from lorabench.zoo import TINY_GEMMA


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY_GEMMA)


CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


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


@pytest.fixture
def chat(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    return tokenizer


def test_chat_template(chat):
    tokens = data.tokenise(examples(("hi", "yo")), chat, config(chat_template=True))
    (ids,), (start,) = tokens.input_ids, tokens.completion_start
    assert chat.decode(ids[:start]) == "<bos>[user]hi<eos>\n[assistant]"
    assert chat.decode(ids[start:]) == "yo<eos>"  # the template's EOS, not a second; no newline
    assert ids.count(chat.bos_token_id) == 1
    whole = data.tokenise(examples(("hi", "yo")), chat, config(chat_template=True, add_eos=False))
    assert chat.decode(whole.input_ids[0][start:]) == "yo<eos>\n"


def test_chat_template_without_eos_gets_one(chat, monkeypatch):
    monkeypatch.setattr(chat, "chat_template", CHAT.replace("{{ eos_token }}", ""))
    tokens = data.tokenise(examples(("hi", "yo"), ("a", "")), chat, config(chat_template=True))
    start = tokens.completion_start[0]
    assert chat.decode(tokens.input_ids[0][start:]) == "yo\n<eos>"
    assert tokens.num_empty == 1


def test_bad_chat_templates(tokenizer, chat, monkeypatch):
    monkeypatch.setattr(chat, "chat_template", "{{ messages | length }}" + CHAT)
    with pytest.raises(
        ConfigErrors,
        match=r"must write a conversation that begins with its prompt; "
        r".* gives '2<bos>.*' in place of '1<bos>.*' at token 0",
    ):
        data.tokenise(examples(("hi", "yo")), chat, config(chat_template=True))
    monkeypatch.setattr(chat, "chat_template", None)
    with pytest.raises(ConfigErrors, match=r"^data\.chat_template: must be false with a tokenizer"):
        data.tokenise(examples(("hi", "yo")), chat, config(chat_template=True))


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


def test_pad_id(tokenizer):
    assert data.pad_id(tokenizer) == tokenizer.pad_token_id == 0
    assert data.pad_id(bpe(eos_token="<e>")) == 4
    assert data.pad_id(bpe()) == 0
