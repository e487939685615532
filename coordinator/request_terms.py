"""On which terms is a request served: for whom, how urgent, how fast?"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, replace

from kvrelay.coordinator.admission.request_class import CLASSES, STANDARD, RequestClass
from kvrelay.errors import InvalidRequestError
from kvrelay.v1 import inference_pb2

_PREFIX = b"x-kvrelay-"
_LOST_CANCEL_S = 0.5
_MIN_S, _MAX_S = 0.001, 86_400.0
_SECONDS = re.compile(r"[0-9]{1,8}(\.[0-9]{0,9})?")
_TENANT = re.compile(r"[!-~]{0,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTerms:
    request_class: RequestClass = STANDARD
    tenant: str = ""
    """Whom it counts for; requests that do not say are one tenant's."""
    ttft_s: float | None = STANDARD.ttft_s
    """Most seconds to the first token; None: any."""
    itl_s: float | None = STANDARD.itl_s
    """Most seconds between two tokens; None: any."""
    ends_s: float | None = None
    """When nobody wants the answer any more, by `time.monotonic`; None: as long as somebody is there."""

    def within(self, timeout_s: float) -> RequestTerms:
        """The same, and nobody wants the answer any more after this time from now."""
        return replace(self, ends_s=time.monotonic() + timeout_s)

    def left_s(self) -> float | None:
        """How long somebody wants the answer; None: as long as somebody is there."""
        return None if self.ends_s is None else max(0.0, self.ends_s - time.monotonic())

    def timeout_ms(self) -> int:
        """What a worker is told: a little more than is left, so that a cancel comes first. 0: for ever."""
        if self.ends_s is None:
            return 0
        left_s = min(_MAX_S, self.ends_s - time.monotonic()) + _LOST_CANCEL_S
        return max(1, round(1e3 * left_s))


STANDARD_TERMS = RequestTerms()
current_terms: ContextVar[RequestTerms] = ContextVar("current_terms", default=STANDARD_TERMS)
"""Of the HTTP request that is being served; vLLM's serving classes have no place for them."""


def terms_of_headers(raw: Iterable[tuple[bytes, bytes]]) -> RequestTerms:
    """Read `x-kvrelay-class`, `-tenant`, `-ttft-s`, `-itl-s` and `-timeout-s`, which counts from now.

    Raises `InvalidRequestError`.
    """
    given = {name: value.decode("latin-1") for name, value in raw if name.startswith(_PREFIX)}
    if not given:
        return STANDARD_TERMS
    timeout_s = _seconds("x-kvrelay-timeout-s", given.get(b"x-kvrelay-timeout-s"))
    terms = _terms(
        request_class=given.get(b"x-kvrelay-class", ""),
        tenant=given.get(b"x-kvrelay-tenant", ""),
        ttft_s=_seconds("x-kvrelay-ttft-s", given.get(b"x-kvrelay-ttft-s")),
        itl_s=_seconds("x-kvrelay-itl-s", given.get(b"x-kvrelay-itl-s")),
        name=lambda field: f"x-kvrelay-{field.removeprefix('request_')}",
    )
    return terms if timeout_s is None else terms.within(timeout_s)


def terms_of_request(request: inference_pb2.GenerateRequest) -> RequestTerms:
    """Of a gRPC request. Raises `InvalidRequestError`."""
    targets = request.targets
    ttft_s = targets.ttft_s if targets.HasField("ttft_s") else None
    itl_s = targets.itl_s if targets.HasField("itl_s") else None
    for name, value in (("targets.ttft_s", ttft_s), ("targets.itl_s", itl_s)):
        if value is not None and not _MIN_S <= value <= _MAX_S:
            raise _not_seconds(name, value)
    return _terms(request_class=request.request_class, tenant=request.tenant, ttft_s=ttft_s, itl_s=itl_s, name=str)


def _terms(
    *, request_class: str, tenant: str, ttft_s: float | None, itl_s: float | None, name: Callable[[str], str]
) -> RequestTerms:
    """`name` makes the name that the client knows of a field's."""
    kind = CLASSES.get(request_class) if request_class else STANDARD
    if kind is None:
        field = name("request_class")
        raise InvalidRequestError(
            f"{field} is {request_class[:80]!r}; it must be one of {', '.join(CLASSES)}", field=field
        )
    if not _TENANT.fullmatch(tenant):
        field = name("tenant")
        raise InvalidRequestError(
            f"{field} is {tenant[:80]!r}; it must be at most 128 printable ASCII characters without spaces", field=field
        )
    return RequestTerms(
        request_class=kind,
        tenant=tenant,
        ttft_s=kind.ttft_s if ttft_s is None else ttft_s,
        itl_s=kind.itl_s if itl_s is None else itl_s,
    )


def _seconds(name: str, value: str | None) -> float | None:
    if value is None:
        return None
    if not _SECONDS.fullmatch(value) or not _MIN_S <= float(value) <= _MAX_S:
        raise _not_seconds(name, value)
    return float(value)


def _not_seconds(name: str, value: object) -> InvalidRequestError:
    shown = repr(value)[:80]
    return InvalidRequestError(f"{name} is {shown}; it must be a number from {_MIN_S:g} to {_MAX_S:g}", field=name)
