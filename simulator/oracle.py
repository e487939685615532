"""How much of the prompts could have been cached at best?"""

from __future__ import annotations

from collections.abc import Iterable

from kvrelay.simulator.block_names import BlockNamer
from kvrelay.workload.trace import TraceRequest


def cachable_tokens(requests: Iterable[TraceRequest], block_tokens: int) -> dict[int, int]:
    """Index -> prompt tokens that an oracle finds cached: those of blocks that any earlier request had.

    It has one store for all workers without limits, into which a prompt goes the moment it arrives. As with real
    stores, whole blocks are found, and the last token is computed.
    """
    namer = BlockNamer(block_tokens)
    seen: set[bytes] = set()
    cachable = {}
    for request in requests:
        names = namer.prompt(request)
        num_known = next((block for block, name in enumerate(names) if name not in seen), len(names))
        cachable[request.index] = min(num_known * block_tokens, request.num_prompt_tokens - 1)
        seen.update(names)
    return cachable
