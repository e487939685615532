"""What does handing a request over cost? `python -m bench.handoff [--json FILE]`.

Two arms on the same machine, interleaved: prefill and decode on a core each, and one vLLM engine on a single core. The
hand-off itself is measured by timestamps inside each request, which one clock has stamped, not by the difference of
two arms.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from dataclasses import dataclass, field

from bench.cluster import measured_cluster
from bench.one_engine import OneEngine, one_engine
from bench.report import Report, median_difference, parser, spread
from kvrelay.client import Client
from kvrelay.models import default_cache_dir, resolve_model

PROMPT_TOKENS = (128, 512, 1500)
ENGINE_OPTIONS = ("--max-model-len", "4096")
NS = 1e9
SETTLE_S = 1.5
"""Between two arms: vLLM's ranks poll for a second after their last step, at the cost of whatever shares their core."""


@dataclass(slots=True)
class Samples:
    """Measurements of one prompt length, seconds but for the bytes."""

    ttft_pd: list[float] = field(default_factory=list)
    ttft_one: list[float] = field(default_factory=list)
    second_pd: list[float] = field(default_factory=list)
    second_one: list[float] = field(default_factory=list)
    added: list[float] = field(default_factory=list)
    first_to_decode: list[float] = field(default_factory=list)
    kv_bytes: list[float] = field(default_factory=list)
    hidden_share: list[float] = field(default_factory=list)


def measure_pair(client: Client, prompt: list[int], samples: Samples) -> None:
    """One request over prefill and decode."""
    began = time.perf_counter()
    times: list[float] = []
    timeline = None
    for chunk in client.stream(prompt, max_tokens=4, temperature=0, ignore_eos=True, include_timeline=True):
        times += [time.perf_counter() - began] * len(chunk.token_ids)
        timeline = chunk.timeline or timeline
    assert timeline is not None
    at = dict(timeline.events)
    samples.ttft_pd.append(times[0])
    samples.second_pd.append(times[1])
    samples.added.append(times[0] - (at["prefill.sampled"] - at["prefill.queued"]) / NS)
    samples.first_to_decode.append((at["decode.sampled"] - at["prefill.sampled"]) / NS)
    samples.kv_bytes.append(timeline.counters["kv.received_bytes"])
    samples.hidden_share.append(timeline.counters["kv.hidden_bytes"] / timeline.counters["kv.wanted_bytes"])


def measure_one(engine: OneEngine, prompt: list[int], samples: Samples) -> None:
    """One request on the single engine."""
    times = engine.token_times_s(prompt)
    samples.ttft_one.append(times[0])
    samples.second_one.append(times[1])


def row(num_tokens: int, samples: Samples) -> dict[str, object]:
    """Medians with quartiles, under the names that the JSON has."""
    return {
        "prompt_tokens": num_tokens,
        "ttft_pd_s": spread(samples.ttft_pd),
        "ttft_one_core_s": spread(samples.ttft_one),
        "second_token_pd_s": spread(samples.second_pd),
        "second_token_one_core_s": spread(samples.second_one),
        "handoff_added_s": spread(samples.added),
        "first_to_decode_token_s": spread(samples.first_to_decode),
        "kv_bytes": int(spread(samples.kv_bytes).median),
        "hidden_share": spread(samples.hidden_share),
    }


def note(num_tokens: int, samples: Samples) -> str:
    """By how much the two arms differ in their time to the second token."""
    difference = median_difference(samples.second_pd, samples.second_one)
    low, median, high = (round(value * 1e3) for value in (difference.low, difference.median, difference.high))
    return (
        f"{num_tokens} tokens: second token {median:+d} ms (95 % confidence: {low:+d} to {high:+d})"
        " against one engine on one core"
    )


def main() -> None:
    """Measure and report."""
    options = parser((__doc__ or "").splitlines()[0])
    options.add_argument(
        "--repetitions", type=int, default=20, metavar="N", help="of each length and arm (%(default)s)"
    )
    args = options.parse_args()
    model = resolve_model("", default_cache_dir(dict(os.environ)))
    results = {num_tokens: Samples() for num_tokens in PROMPT_TOKENS}
    numbers = random.Random(1)
    with (
        tempfile.TemporaryDirectory(prefix="kvrelay-bench-") as scratch,
        measured_cluster(engine_options=ENGINE_OPTIONS) as cluster,
        one_engine(model.path, "0", scratch, ENGINE_OPTIONS) as engine,
        Client(cluster.grpc_address) as client,
    ):
        for repetition in range(args.repetitions + 1):
            for num_tokens, samples in results.items():
                kept = samples if repetition else Samples()  # The first round warms up.
                time.sleep(SETTLE_S)
                measure_pair(client, [numbers.randrange(1000, 40000) for _ in range(num_tokens)], kept)
                time.sleep(SETTLE_S)
                measure_one(engine, [numbers.randrange(1000, 40000) for _ in range(num_tokens)], kept)
    config = {"model": model.served_name, "dtype": "bfloat16", "repetitions": args.repetitions, "cores": "1 + 1, and 1"}
    report = Report("handoff", config)
    report.rows = [row(num_tokens, samples) for num_tokens, samples in results.items()]
    report.notes = [note(num_tokens, samples) for num_tokens, samples in results.items()]
    report.finish(args.json)


if __name__ == "__main__":
    main()
