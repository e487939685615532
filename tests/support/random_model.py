"""A small Llama with random weights on disk, which engines of any tensor-parallel size load alike."""

from __future__ import annotations

import shutil
from pathlib import Path

LAYERS, KV_HEADS, HEAD_ELEMENTS = 3, 2, 32
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def write_random_model(target: Path, tokenizer: Path) -> None:
    """Write the same float32 weights every time, with the tokenizer of the model in folder `tokenizer`.

    Weights are larger than in trained models: attention then decides what comes next, so that a wrong block of KV
    changes the answer.
    """
    import torch
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

    like = AutoConfig.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=like.vocab_size,
        bos_token_id=like.bos_token_id,
        eos_token_id=like.eos_token_id,
        hidden_size=4 * HEAD_ELEMENTS,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=4096,
        initializer_range=0.2,
        tie_word_embeddings=False,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(target)
    for name in _TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, target)
