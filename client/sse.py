"""What do server-sent events say, whatever pieces their bytes come in?"""

from __future__ import annotations

_LARGEST_EVENT_BYTES = 16 << 20
_DATA = b"data:"


class EventTooLargeError(ValueError):
    """The server does not end its event."""


class EventParser:
    """The data of one stream's events; other fields and comments are passed over.

    Lines end with LF or CRLF (HTML Standard, section 9.2.6); a lone CR, which the standard allows too, ends none.
    """

    __slots__ = ("_data", "_num_bytes", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._num_bytes = 0

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of every event that `piece` completes. Raises `EventTooLargeError`."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        events: list[bytes] = []
        for line in lines:
            self._take(line.removesuffix(b"\r"), events)
        if self._num_bytes + len(self._rest) > _LARGEST_EVENT_BYTES:
            raise EventTooLargeError(f"an event of the stream is larger than {_LARGEST_EVENT_BYTES} bytes")
        return events

    def _take(self, line: bytes, events: list[bytes]) -> None:
        if line.startswith(_DATA):
            data = line[len(_DATA) :].removeprefix(b" ")
            self._data.append(data)
            self._num_bytes += len(data)
        elif not line and self._data:
            events.append(b"\n".join(self._data))
            self._data = []
            self._num_bytes = 0
