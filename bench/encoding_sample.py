"""KV blocks as they are: what the default model keeps of real text, in the order of a host block store."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.kv_side import Bytes
from kvrelay.kv_transfer.part_shape import PartShape

BLOCK_SIZE_TOKENS = 32
_TEXTS = ("README.md", "docs/architecture.md", "docs/design.md", "CONTRIBUTING.md")
"""English prose with tables and code; as many tokens of it as are wanted."""


def sample(model: str, dtype: str, num_blocks: int) -> tuple[PartShape, list[Bytes]]:
    """The shape of a block and so many of them, `[layer, kv_head, token, K||V]`; of one prompt, computed at once."""
    folder = Path(__file__).resolve().parent.parent
    text = "\n".join((folder / name).read_text() for name in _TEXTS)
    tokens = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt").input_ids
    num_tokens = num_blocks * BLOCK_SIZE_TOKENS
    if tokens.shape[1] < num_tokens:
        raise ValueError(f"{num_blocks} blocks need {num_tokens} tokens; the texts have {tokens.shape[1]}")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    with torch.inference_mode():
        cache = network.model(tokens[:, :num_tokens], use_cache=True).past_key_values
    # Of each layer [kv_head, token, K||V].
    layers = torch.stack([torch.cat((layer.keys[0], layer.values[0]), -1) for layer in cache.layers])
    num_layers, num_heads, _, elements = layers.shape
    blocks = layers.view(num_layers, num_heads, num_blocks, BLOCK_SIZE_TOKENS, elements).permute(2, 0, 1, 3, 4)
    shape = PartShape(
        num_layers=num_layers,
        num_kv_heads=num_heads,
        block_size_tokens=BLOCK_SIZE_TOKENS,
        head_elements=elements,
        dtype=dtype,
    )
    return shape, list(blocks.contiguous().view(torch.uint8).view(num_blocks, -1).numpy())
