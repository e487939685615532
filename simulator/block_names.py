"""Which KV blocks do the prompt and the answer of a recorded request consist of?"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from kvrelay.block_hash import HASH_BYTES
from kvrelay.workload.trace import TraceRequest


class BlockNamer:
    """Names blocks of `block_tokens` tokens, in place of hashes of tokens that nobody needs to make up.

    Two prompts have a block's name in common when they have everything up to its end in common. Raises `ValueError`
    for traces whose own blocks are no multiple of such blocks.
    """

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._known: dict[int, list[bytes]] = {}

    def prompt(self, request: TraceRequest) -> list[bytes]:
        """All blocks of the prompt, the last one full or not."""
        num_blocks = -(-request.num_prompt_tokens // self._block_tokens)
        if not request.block_ids:
            return [_name("request", request.index, block) for block in range(num_blocks)]
        num_parts, rest = divmod(request.block_tokens, self._block_tokens)
        if rest:
            raise ValueError(
                f"blocks of the trace have {request.block_tokens} tokens, which is no multiple of"
                f" {self._block_tokens}, the block size"
            )
        names: list[bytes] = []
        for block_id in request.block_ids:
            parts = self._known.get(block_id)
            if parts is None:
                parts = self._known[block_id] = [_name("block", block_id, part) for part in range(num_parts)]
            names += parts
        return names[:num_blocks]

    def answer(self, request: TraceRequest) -> Sequence[bytes]:
        """The blocks that generated tokens complete; nobody else has them, since traces do not tell who has."""
        first = request.num_prompt_tokens // self._block_tokens
        end = (request.num_prompt_tokens + request.num_output_tokens) // self._block_tokens
        return [_name("answer", request.index, block) for block in range(first, end)]


def _name(kind: str, *numbers: int) -> bytes:
    return blake2b(repr((kind, *numbers)).encode(), digest_size=HASH_BYTES).digest()
