"""How long does a look-up in the prefix index take, how much memory does a block, and what does following workers cost?

A million blocks in a thousand chains of a thousand, each chain held by a quarter of 64 workers to a random length and
by one in full. Look-ups are of whole chains and of their beginnings, each a chain that was not looked up just before.
Then a hundred workers write ten deltas a second, of which the cost of decoding and applying is measured, on top of that
index; no etcd and no network.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from bench.report import Report, parser
from kvrelay.coordinator.prefix_index.index import PrefixIndex
from kvrelay.coordinator.prefix_index.logs import LogEntry, PrefixLogs
from kvrelay.v1 import cluster_pb2

NUM_WORKERS = 64
NUM_CHAINS = 1000
CHAIN_BLOCKS = 1000
SHORT_BLOCKS = 64
_DELTA_WORKERS = 100
_DELTAS_PER_S = 10
_DELTA_BLOCKS = 64
"""Added, and as many removed: of blocks of 16 tokens, 10,000 prompt tokens a second and worker."""

_Keys = npt.NDArray[np.uint64]


def filled(numbers: np.random.Generator, keys: _Keys) -> PrefixIndex:
    """The index, filled in pieces like those that workers send, of all chains in turns."""
    index = PrefixIndex()
    pieces = []
    for number in range(NUM_CHAINS):
        chain = keys[number * CHAIN_BLOCKS : (number + 1) * CHAIN_BLOCKS]
        for worker in range(number % 4, NUM_WORKERS, 4):
            held = chain[: CHAIN_BLOCKS if worker == number % NUM_WORKERS else numbers.integers(1, CHAIN_BLOCKS + 1)]
            pieces += [(worker, held[start : start + SHORT_BLOCKS]) for start in range(0, len(held), SHORT_BLOCKS)]
    for place in numbers.permutation(len(pieces)):
        worker, piece = pieces[place]
        index.add(f"worker-{worker}", piece)
    return index


def match_us(index: PrefixIndex, numbers: np.random.Generator, keys: _Keys, num_blocks: int) -> list[float]:
    """Of every chain once."""
    times = []
    for number in numbers.permutation(NUM_CHAINS):
        prompt = keys[number * CHAIN_BLOCKS : number * CHAIN_BLOCKS + num_blocks].copy()
        began_s = time.perf_counter()
        found = index.match(prompt)
        times.append((time.perf_counter() - began_s) * 1e6)
        if max(found.values(), default=0) != num_blocks:
            raise RuntimeError("the index has lost a block")
    return times


def deltas(numbers: np.random.Generator, duration_s: int) -> Iterator[tuple[str, int, bytes]]:
    """Worker, sequence and message; each delta removes what one of the same worker added before."""
    before = dict.fromkeys(range(_DELTA_WORKERS), b"")
    for sequence in range(duration_s * _DELTAS_PER_S):
        for worker in range(_DELTA_WORKERS):
            added = numbers.integers(1, 2**64 - 1, _DELTA_BLOCKS, dtype=np.uint64).tobytes()
            delta = cluster_pb2.PrefixDelta(added=added, removed=before[worker], published_unix_ns=time.time_ns())
            before[worker] = added
            yield f"writer-{worker}", sequence, delta.SerializeToString()


def apply_core_share(index: PrefixIndex, numbers: np.random.Generator, duration_s: int) -> float:
    """CPU time of decoding and applying `duration_s` seconds of deltas, as a share of these seconds."""
    logs = PrefixLogs(index)
    written = list(deltas(numbers, duration_s))
    began_s = time.process_time()
    for worker_id, sequence, content in written:
        entry = LogEntry(sequence, cluster_pb2.PrefixDelta.FromString(content), len(content))
        for _ in logs.put(worker_id, "1", entry):
            pass
    return (time.process_time() - began_s) / duration_s


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--seconds", type=int, default=20, help="of deltas")
    options.add_argument("--seed", type=int, default=1)
    given = options.parse_args()
    numbers = np.random.default_rng(given.seed)
    keys = numbers.integers(1, 2**64 - 1, NUM_CHAINS * CHAIN_BLOCKS, dtype=np.uint64)
    index = filled(numbers, keys)
    bytes_per_block = index.size_bytes / index.num_blocks
    num_blocks, num_entries = index.num_blocks, index.num_entries
    whole = match_us(index, numbers, keys, CHAIN_BLOCKS)
    short = match_us(index, numbers, keys, SHORT_BLOCKS)
    share = apply_core_share(index, numbers, given.seconds)
    figures = {
        "match_p50_us": statistics.median(whole),
        "match_p99_us": statistics.quantiles(whole, n=100)[98],
        f"match_{SHORT_BLOCKS}_p50_us": statistics.median(short),
        f"match_{SHORT_BLOCKS}_p99_us": statistics.quantiles(short, n=100)[98],
        "bytes_per_block": bytes_per_block,
        "apply_core_share": share,
    }
    config = {"workers": NUM_WORKERS, "blocks": num_blocks, "entries": num_entries, "seconds": given.seconds}
    report = Report("prefix_index", config)
    report.rows = [figures]
    report.figures = figures
    report.notes.append(
        f"{CHAIN_BLOCKS} blocks a look-up, or {SHORT_BLOCKS}; {_DELTA_WORKERS} workers, {_DELTAS_PER_S} deltas/s each, "
        f"{_DELTA_BLOCKS} blocks added and removed by each."
    )
    report.finish(given.json)


if __name__ == "__main__":
    main()
