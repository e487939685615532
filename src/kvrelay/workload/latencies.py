"""How long did requests wait for their tokens?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvrelay.workload.outcome import Outcome

Samples = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Of some requests, in their order, from when each was due: a load that falls behind is no excuse.

    NaN where a request has no such figure: without a token all, with a single one those about gaps.
    """

    ttft_s: Samples
    tpot_s: Samples
    longest_itl_s: Samples
    e2e_s: Samples
    """To the last token."""
    itl_s: Samples
    """All gaps of all requests together."""


def latencies_of(outcomes: Sequence[Outcome]) -> Latencies:
    figures = np.full((4, len(outcomes)), np.nan)
    gaps: list[Samples] = []
    for column, outcome in enumerate(outcomes):
        times_s = np.asarray(outcome.token_times_s, dtype=np.float64)
        if times_s.size:
            figures[0, column] = times_s[0] - outcome.arrived_s
            figures[3, column] = times_s[-1] - outcome.arrived_s
        if times_s.size > 1:
            of_request = np.diff(times_s)
            figures[1, column] = of_request.mean()
            figures[2, column] = of_request.max()
            gaps.append(of_request)
    return Latencies(
        ttft_s=figures[0],
        tpot_s=figures[1],
        longest_itl_s=figures[2],
        e2e_s=figures[3],
        itl_s=np.concatenate(gaps) if gaps else np.empty(0),
    )
