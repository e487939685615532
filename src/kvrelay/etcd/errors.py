"""What can go wrong between this process and etcd?"""

from __future__ import annotations

import grpc
import grpc.aio


class EtcdError(Exception):
    """Base of all errors of this package. Retrying the same call does not help."""


class EtcdUnavailableError(EtcdError):
    """No endpoint answered in time; a later attempt may succeed. A write may have been applied."""


class EtcdAuthenticationError(EtcdError):
    """The token or the credentials were refused."""


class LeaseNotFoundError(EtcdError):
    """The lease has expired or was revoked."""


class LeaseLostError(EtcdError):
    """A kept lease is gone, or no answer came for as long as it lives; what it held is deleted."""

    def __init__(self, lease_id: int) -> None:
        super().__init__(f"lease {lease_id:x} is lost")
        self.lease_id = lease_id


class WatchOutdatedError(EtcdError):
    """Events between the known revision and now cannot be had: list again and watch from there.

    Either the revision was compacted, or the store is not the one that the revision came from.
    """


_UNAVAILABLE = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
}


def from_grpc(error: grpc.aio.AioRpcError) -> EtcdError:
    """The package's error for a failed call. Unknown and internal ones come from connections that break."""
    code, details = error.code(), error.details() or ""
    message = f"etcd: {details or code.name}"
    if code in _UNAVAILABLE:
        return EtcdUnavailableError(message)
    if code is grpc.StatusCode.UNAUTHENTICATED or "invalid auth token" in details:
        return EtcdAuthenticationError(message)
    if code is grpc.StatusCode.NOT_FOUND and "lease" in details:
        return LeaseNotFoundError(message)
    return EtcdError(message)
