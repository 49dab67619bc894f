"""Configs of tiny models, one an architecture."""

from __future__ import annotations

from typing import Any

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def tiny_config(kind: str, vocab_size: int) -> Any:
    """A transformers config of a small model of that architecture."""
    import transformers as t

    common = SMALL | {"vocab_size": vocab_size}
    # BERT and OPT know no grouped heads, and OPT calls an MLP's width otherwise.
    unknown = ("num_key_value_heads", "head_dim", "intermediate_size")
    plain = {name: value for name, value in common.items() if name not in unknown}
    if kind == "gpt2":
        return t.GPT2Config(
            vocab_size=vocab_size,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            bos_token_id=2,
            eos_token_id=1,
        )
    if kind == "bloom":
        return t.BloomConfig(vocab_size=vocab_size, hidden_size=32, n_layer=2, n_head=4)
    if kind == "falcon":
        return t.FalconConfig(**plain, bias=True)
    if kind == "mpt":
        return t.MptConfig(
            vocab_size=vocab_size, d_model=32, n_heads=4, n_layers=2, max_seq_len=128
        )
    if kind in ("bert", "bert12"):  # as a decoder: LayerNorms, biases, a head with a transform
        plain["num_hidden_layers"] = 12 if kind == "bert12" else 2
        return t.BertConfig(**plain, intermediate_size=64, is_decoder=True)
    if kind == "opt":
        return t.OPTConfig(**plain, ffn_dim=64, word_embed_proj_dim=32)
    if kind == "qwen3_moe":
        common |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    if kind == "mixtral":
        common |= {"num_local_experts": 4}
    if kind == "phi3":
        common |= {"pad_token_id": 0}
    if kind in ("gemma2", "gemma3"):  # shorter than an example: some layers see less than others
        common |= {"sliding_window": 8}
    makers = {
        "gemma": t.GemmaConfig,
        "gemma2": t.Gemma2Config,
        "gemma3": t.Gemma3TextConfig,
        "llama": t.LlamaConfig,
        "mixtral": t.MixtralConfig,
        "nemotron": t.NemotronConfig,
        "phi3": t.Phi3Config,
        "qwen2": t.Qwen2Config,
        "qwen3": t.Qwen3Config,
        "qwen3_moe": t.Qwen3MoeConfig,
    }
    return makers[kind](**common)
