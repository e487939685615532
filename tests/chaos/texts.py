"""What text do tokens make, piece by piece as a coordinator tells it?"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from kvrelay.models import default_cache_dir, resolve_model

_INVALID_PREFIX = "Invalid prefix encountered"


@functools.cache
def _tokenizer() -> Tokenizer:
    resolved = resolve_model("", default_cache_dir(dict(os.environ)), lambda _: None)
    return Tokenizer.from_file(str(Path(resolved.path) / "tokenizer.json"))


def expected_text(prompt: Sequence[int], token_ids: Sequence[int]) -> str:
    """The text of generated tokens, by the same steps as vLLM's detokenizer (vllm/v1/engine/detokenizer.py)."""
    tokenizer = _tokenizer()
    stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
    pieces = []
    for token_id in token_ids:
        try:
            piece = stream.step(tokenizer, token_id)
        except Exception as error:  # The library's own bare one.
            if not str(error).startswith(_INVALID_PREFIX):
                raise
            stream = DecodeStream(skip_special_tokens=True)
            piece = stream.step(tokenizer, token_id)
        pieces.append(piece or "")
    return "".join(pieces)
