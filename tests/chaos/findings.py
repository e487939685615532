"""What do all answers say, and which of them were hit by which fault?"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.faults.base import Fault
from tests.chaos.faults.processes import KillDecode
from tests.chaos.load import Answer
from tests.chaos.verdict import BAD, Verdict, verdict_of

AFTERMATH_S = 2.0
"""So long after it is healed a fault still counts for what happens."""
_UNDER_WAY_S = 0.2


@dataclass(slots=True)
class Injection:
    """One fault that was injected. Times are those of `time.monotonic`."""

    fault: Fault
    began_s: float
    num_in_flight: int
    healed_s: float = math.inf
    error: str = ""
    """Why it could not be healed."""

    def hits(self, answer: Answer) -> bool:
        """Whether they were there at the same time."""
        ended_s = math.inf if answer.ended_s is None else answer.ended_s
        return answer.began_s < self.healed_s + AFTERMATH_S and ended_s > self.began_s

    def pause_s(self, answer: Answer) -> float:
        """The longest time between two tokens that it may have caused."""
        pairs = itertools.pairwise(answer.token_times_s)
        until_s = self.healed_s + AFTERMATH_S
        return max((late - early for early, late in pairs if early < until_s and late > self.began_s), default=0.0)


@dataclass(slots=True)
class Judged:
    """An answer and its verdict."""

    answer: Answer
    verdict: Verdict
    faults: Sequence[Injection]

    def text(self) -> str:
        """What happened, for a person to look into."""
        plan, got = self.answer.plan, self.answer.tokens
        unit = "characters" if plan.way == "events" else "tokens"
        numbers = ", ".join(f"{len(tokens)} of {len(plan.expected())} {unit}" for tokens in got)
        error = f" {type(self.answer.error).__name__}: {self.answer.error}" if self.answer.error else ""
        hit_by = ", ".join(f"{hit.fault.name} {hit.fault.target}" for hit in self.faults)
        asked = f"{plan.request_id} by {plan.way} at {self.answer.coordinator}, seed {plan.seed}, n {plan.n}"
        return f"{self.verdict.value}: {asked}: {numbers}.{error} During: {hit_by or 'no fault'}."


@dataclass(slots=True)
class Findings:
    """All of a run."""

    seed: int
    seconds: float
    judged: list[Judged]
    injections: list[Injection]
    leaks: list[str] = field(default_factory=list)
    unexpected_ends: list[str] = field(default_factory=list)

    @property
    def totals(self) -> Counter[Verdict]:
        return Counter(each.verdict for each in self.judged)

    @property
    def is_good(self) -> bool:
        """Whether nothing happened that must not."""
        broken = [hit.error for hit in self.injections if hit.error]
        return not (self.leaks or self.unexpected_ends or broken or any(self.totals[bad] for bad in BAD))

    def bad(self) -> list[Judged]:
        return [each for each in self.judged if each.verdict in BAD]

    def failed(self) -> list[Judged]:
        """Those that ended with an error and are not bad."""
        return [each for each in self.judged if each.answer.error is not None and each.verdict not in BAD]

    def errors(self) -> Counter[str]:
        """What clients were told, with numbers and names taken out."""
        told = (each.answer for each in self.judged if each.answer.error is not None and not each.answer.cancelled)
        return Counter(f"{type(answer.error).__name__}: {_generic(str(answer.error))}" for answer in told)

    def recovery_s(self) -> list[float]:
        """The longest pauses, from the kill on, of the streams whose decode worker was killed; sorted."""
        kills = [hit.fault for hit in self.injections if isinstance(hit.fault, KillDecode)]
        pauses = (_pause_around_s(stream, kill.killed_s) for kill in kills for stream in kill.streams)
        return sorted(pause for pause in pauses if pause is not None)


def judge(answers: Iterable[Answer], injections: Sequence[Injection]) -> list[Judged]:
    """All answers, those that have not ended as lost."""
    return [_judge(answer, [hit for hit in injections if hit.hits(answer)]) for answer in answers]


def _judge(answer: Answer, faults: Sequence[Injection]) -> Judged:
    verdict = verdict_of(
        answer.plan.expected(),
        answer.tokens,
        TimeoutError("never ended") if answer.abandoned else answer.error,
        cancelled=answer.cancelled,
        cannot_resume=answer.plan.way == "events"
        and any(answer.coordinator in hit.fault.coordinators for hit in faults),
    )
    return Judged(answer, verdict, faults)


def rows(findings: Findings) -> list[dict[str, Any]]:
    """A line for each kind of fault: how often, and what became of the requests that it hit."""
    made = []
    for name in sorted({hit.fault.name for hit in findings.injections}):
        hits = [hit for hit in findings.injections if hit.fault.name == name]
        touched = [each for each in findings.judged if any(hit in each.faults for hit in hits)]
        row: dict[str, Any] = {"fault": name, "count": len(hits), "reached": sum(hit.fault.is_reached for hit in hits)}
        row["in_flight"] = sum(hit.num_in_flight for hit in hits)
        row |= {verdict.value: sum(each.verdict is verdict for each in touched) for verdict in Verdict}
        row["worst_pause_s"] = max((hit.pause_s(each.answer) for each in touched for hit in hits), default=0.0)
        made.append(row)
    return made


def percentile(values: Sequence[float], share: float) -> float | None:
    """Nearest rank of sorted values; None when there are none."""
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else None


def _pause_around_s(stream: Answer, killed_s: float) -> float | None:
    """None for a stream that got all its tokens before. What was under way may come still."""
    pairs = itertools.pairwise(stream.token_times_s)
    around = [late - max(early, killed_s) for early, late in pairs if late > killed_s > early - _UNDER_WAY_S]
    return max(around, default=None)


def _generic(text: str) -> str:
    text = re.sub(r"\d+", "N", text)
    return re.sub(r"(prefill|decode|coordinator)-N", r"\1-N", text)[:200]
