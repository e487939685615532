"""Do long prompts disturb those who are being answered? `python -m bench.mixed [--json FILE]`.

Some streams decode steadily while a long prompt comes in every few seconds: on prefill and decode with a core each, on
one vLLM server that has both cores, with its own defaults and with prefill in chunks of 256 tokens, and on two vLLM
servers with a core each, by turns. One after the other, since each needs the whole machine; every arm has the same
client, over HTTP, which shares the cores.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

from bench.cluster import measured_cluster
from bench.mixed_load import Load, Measured, apply
from bench.report import Report, parser
from bench.token_stream import Server
from bench.vllm_server import vllm_server
from kvrelay.models import default_cache_dir, resolve_model

ENGINE_OPTIONS = ("--max-model-len", "4096")
STALL_S = 0.1

Servers = AbstractContextManager[Sequence[Server]]


@contextlib.contextmanager
def pair(*options: str) -> Iterator[Sequence[Server]]:
    """`kvrelay up` with these options of its engines."""
    with measured_cluster(engine_options=options) as cluster:
        yield [Server(url=cluster.http_url, model=cluster.model)]


@contextlib.contextmanager
def vllm(model: str, cores: Sequence[Sequence[int]], *options: str) -> Iterator[Sequence[Server]]:
    """A server for each element of `cores`."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(vllm_server(model, some, options)) for some in cores]


def all_arms(model: str, mode: str) -> dict[str, Callable[[], Servers]]:
    """Name -> what starts it, given vLLM's option for compiled or eager engines. Uses two cores."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    options = (*ENGINE_OPTIONS, mode)
    return {
        "pair": lambda: pair(*options),
        "one_vllm": lambda: vllm(model, [cores], *options),
        "one_vllm_chunks": lambda: vllm(model, [cores], *options, "--max-num-batched-tokens", "256"),
        "two_vllm": lambda: vllm(model, [[core] for core in cores], *options),
    }


def row(name: str, measured: Measured) -> dict[str, Any]:
    """What one arm did."""
    itl_ms = [1e3 * value for value in measured.itl_s]
    permille = statistics.quantiles(itl_ms, n=1000, method="inclusive")
    return {
        "arm": name,
        "itl_p50_ms": permille[499],
        "itl_p99_ms": permille[989],
        "itl_p99_9_ms": permille[998],
        "itl_max_ms": max(itl_ms),
        "stalls_over_100_ms": sum(value > STALL_S for value in measured.itl_s),
        "long_ttft_p50_s": statistics.median(measured.ttft_s),
        "long_ttft_max_s": max(measured.ttft_s),
        "long_unanswered": measured.num_unanswered,
        "tokens_per_s": measured.num_stream_tokens / measured.seconds,
        "tokens_per_s_with_long": measured.num_tokens / measured.seconds,
    }


def main() -> None:
    """Measure and report."""
    model = resolve_model("", default_cache_dir(dict(os.environ)))
    names = list(all_arms(model.path, ""))
    options = parser((__doc__ or "").splitlines()[0])
    options.add_argument("--seconds", type=float, default=60.0, metavar="S", help="measured, of each arm (%(default)s)")
    options.add_argument("--arms", nargs="+", choices=names, default=names, metavar="ARM", help="some of the arms")
    options.add_argument("--compile", action="store_true", help="compiled engines: faster, a start takes minutes")
    args = options.parse_args()
    load = Load(seconds=args.seconds)
    config = {"model": model.served_name, "dtype": "bfloat16", "compiled": args.compile, **asdict(load)}
    report = Report("mixed", config)
    arms = all_arms(model.path, "--no-enforce-eager" if args.compile else "--enforce-eager")
    for name in args.arms:
        with arms[name]() as servers:
            report.rows.append(row(name, asyncio.run(apply(load, servers))))
    report.notes.append("tokens_per_s: of the steady streams; gaps between tokens (ITL) are theirs, too")
    report.finish(args.json)


if __name__ == "__main__":
    main()
