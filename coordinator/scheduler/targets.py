"""Which plans keep what the request asks for?"""

from __future__ import annotations

from collections.abc import Sequence

from kvrelay.coordinator.scheduler.option import Option
from kvrelay.coordinator.scheduler.view import RequestShape
from kvrelay.errors import OverloadedError


def within_targets(options: Sequence[Option], request: RequestShape) -> Sequence[Option]:
    """Those that meet both targets; where none does, of those in time for the first token the ones with the least ITL.

    None when none is in time for the first token.
    """
    if (ttft_s := request.ttft_s) is not None:
        options = [option for option in options if option.ttft_s <= ttft_s]
    if options and (itl_s := request.itl_s) is not None:
        least_s = min(option.decode.itl_s for option in options)
        options = [option for option in options if option.decode.itl_s <= max(itl_s, least_s)]
    return options


def too_late(options: Sequence[Option], request: RequestShape) -> OverloadedError:
    """What is to be raised when none of the options, at least one, is in time; says from when on one will be.

    A wait for others gets shorter by a second each second; fetching, computing and transfer do not.
    """
    ttft_s = request.ttft_s or 0.0
    best_s = min(option.ttft_s for option in options)
    message = f"the first token is predicted after {best_s:.3f} s; ttft_s allows {ttft_s:.3f} s"
    excesses_s = [option.ttft_s - ttft_s for option in options if option.idle_ttft_s <= ttft_s]
    if not excesses_s:
        return OverloadedError(f"{message}, which no worker can keep even when idle", field="ttft_s")
    retry_after_s = min(excesses_s)
    return OverloadedError(
        f"{message}; try again in {retry_after_s:.3f} s", field="ttft_s", retry_after_s=retry_after_s
    )
