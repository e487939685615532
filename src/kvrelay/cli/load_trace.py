"""Which requests does a load have? Those of a trace, or a line that says what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvrelay.cli.failure import WRONG_USAGE, fail

if TYPE_CHECKING:
    from kvrelay.workload.trace import TraceOptions, TraceRequest


def read_requests(path: Path, options: TraceOptions) -> list[TraceRequest]:
    """Leaves with a message when the file is no trace."""
    from kvrelay.workload.trace import TraceError, read_trace

    try:
        return read_trace(path, options)
    except TraceError as error:
        fail(str(error), WRONG_USAGE)
    except OSError as error:
        fail(f"the trace {path} cannot be read: {error.strerror}", WRONG_USAGE)
