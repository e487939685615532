"""How is a worker's host block store configured?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kvrelay.kv_transfer.collective_group import CollectiveConfig
from kvrelay.kv_transfer.compression import Compression
from kvrelay.kv_transfer.transport import KvTransport


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """The host block store."""

    size_bytes: int = 2 << 30
    max_granted_blocks: int = 64
    """Slots lent to the engine for blocks of generated tokens; an eighth of the store at most."""
    transport: KvTransport = KvTransport.AUTO
    """Which ways blocks may take to other workers, and from them."""
    collective: CollectiveConfig = field(default_factory=CollectiveConfig)
    compression: Compression = Compression.NONE
    """Of frames that leave; fp8 also says that they may come so."""
    transfer_hold_s: float = 60.0
    """How long received blocks are held for a request that does not come."""
    disk_bytes: int = 0
    """Room on disk for blocks that leave the store; 0 for none."""
    disk_path: Path = Path("/var/tmp")  # noqa: S108 - the file has no name
    """Folder of the file that takes them."""
