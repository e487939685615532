"""A small asyncio client of etcd v3, and a throw-away server."""

from kvrelay.etcd.client import Creation, EtcdClient, Lease, Listing, connect, prefix_end
from kvrelay.etcd.errors import (
    EtcdAuthenticationError,
    EtcdError,
    EtcdUnavailableError,
    LeaseLostError,
    LeaseNotFoundError,
    WatchOutdatedError,
)
from kvrelay.etcd.transport import EtcdConfig, EtcdTls

__all__ = [
    "Creation",
    "EtcdAuthenticationError",
    "EtcdClient",
    "EtcdConfig",
    "EtcdError",
    "EtcdTls",
    "EtcdUnavailableError",
    "Lease",
    "LeaseLostError",
    "LeaseNotFoundError",
    "Listing",
    "WatchOutdatedError",
    "connect",
    "prefix_end",
]
