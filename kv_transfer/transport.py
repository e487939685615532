"""Which ways may KV blocks take between two workers?"""

from __future__ import annotations

from enum import StrEnum


class KvTransport(StrEnum):
    """What one worker allows, as sender and as receiver; a pair uses what both allow."""

    AUTO = "auto"
    """Shared memory on one machine, gRPC otherwise."""
    GRPC = "grpc"
    """Nothing but frames over gRPC."""
    COLLECTIVE = "collective"
    """NCCL where both have GPUs, gloo otherwise; gRPC while there is no process group."""

    @property
    def shares_memory(self) -> bool:
        """Whether workers on the same machine may map the store and copy from it."""
        return self is KvTransport.AUTO
