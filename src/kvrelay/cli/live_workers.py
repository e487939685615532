"""What are the workers of a running cluster like? Asked for `kvrelay simulate --live`."""

from __future__ import annotations

import asyncio
import sys

from kvrelay.cli.failure import FAILED, UNREACHABLE, fail
from kvrelay.cli.parsing import Addresses
from kvrelay.client.workers import ask_workers
from kvrelay.etcd import EtcdError
from kvrelay.simulator.live_cluster import LiveWorkers, like_workers

_TIMEOUT_S = 2.0


def ask(etcd: Addresses, cluster: str) -> LiveWorkers:
    """Leaves with a message when they tell too little."""
    addresses = [str(address) for address in etcd]
    try:
        workers = like_workers(asyncio.run(ask_workers(addresses, cluster, _TIMEOUT_S)))
    except EtcdError as error:
        fail(f"no etcd answers at {', '.join(addresses)}: {error}", UNREACHABLE)
    except ValueError as error:
        fail(f"--live: {error}", FAILED)
    times, size = workers.times, workers.engine.max_batched_tokens
    print(
        f"kvrelay: as measured over {times.num_prefills} prompts and {times.num_steps} steps, a prompt of {size} tokens"
        f" takes {times.prefill_s(size):.3f} s, a decode step of one sequence {times.step_s(1, size):.3f} s",
        file=sys.stderr,
    )
    return workers
