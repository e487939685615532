"""Whom does a request name that holds more of its prompt?"""

from __future__ import annotations

from kvrelay.kv_transfer.borrowing import PrefixSource
from kvrelay.v1 import worker_pb2


def source_of(request: worker_pb2.Prefill | worker_pb2.Decode) -> PrefixSource | None:
    """None when it names nobody."""
    if not request.prefix_address:
        return None
    return PrefixSource(request_id=request.request_id, address=request.prefix_address, trace=request.trace)
