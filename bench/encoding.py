"""How small do KV blocks become, and how fast? `python -m bench.encoding [--json FILE]`.

Blocks are those of the default model on text of this repository, and a block is a frame. Speeds are in GB of raw bytes
for each second of processor time that the one thread took, so neighbours on the machine count for little; the arms take
turns, block by block. Below the two encodings stand coders for the highest byte of each element, which is what shrinks:
ours was chosen from these. Their speeds are in bytes of that plane.

lz4 takes part where it is installed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.encoding_coders import Coder, all_coders
from bench.encoding_sample import sample
from bench.kv_side import Bytes
from bench.report import Report, parser, spread
from kvrelay.kv_transfer.encoding import Encoding, decode, encode
from kvrelay.kv_transfer.encoding_choice import fastest_link
from kvrelay.kv_transfer.part_shape import ITEM_BYTES, PartShape
from kvrelay.models import default_cache_dir, resolve_model

GB = 1e9
NUM_BLOCKS = 32

Code = Callable[[memoryview], bytes]
Restore = Callable[[bytes, memoryview], None]


@dataclass(slots=True)
class Arm:
    """One way of coding, and what was measured of it; a time for each block and round."""

    what: str
    """Whose bytes are meant: a frame's, or those of its highest plane."""
    name: str
    code: Code
    restore: Restore
    encode_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    raw_bytes: int = 0
    coded_bytes: int = 0
    errors: list[npt.NDArray[np.float64]] = field(default_factory=list)

    def measure(self, block: Bytes) -> Bytes:
        """Code a block and restore it; returns what came back."""
        target = np.zeros_like(block)
        began = time.thread_time()
        coded = self.code(block.data)
        between = time.thread_time()
        self.restore(coded, target.data)
        ended = time.thread_time()
        self.encode_s.append(between - began)
        self.decode_s.append(ended - between)
        self.raw_bytes += block.nbytes
        self.coded_bytes += len(coded)
        return target


def frame_arm(encoding: Encoding, shape: PartShape) -> Arm:
    """What the transfer of KV blocks does."""
    return Arm(
        "frame",
        encoding.name.lower(),
        lambda block: b"".join(encode(encoding, shape, [block])),
        lambda coded, target: decode(encoding, shape, coded, [target]),
    )


def plane_arm(coder: Coder) -> Arm:
    """A coder for one plane."""

    def restore(coded: bytes, target: memoryview) -> None:
        target[:] = coder.decode(coded, len(target))

    return Arm("highest bytes", coder.name, lambda block: coder.encode(bytes(block)), restore)


def measure(shape: PartShape, blocks: Sequence[Bytes], rounds: int) -> list[dict[str, Any]]:
    """A row for each arm with elements of one type. Raises `RuntimeError` when an arm loses what it must not lose."""
    frames = [frame_arm(encoding, shape) for encoding in Encoding]
    planes = [plane_arm(coder) for coder in all_coders()]
    highest = [np.ascontiguousarray(block.reshape(-1, shape.item_bytes)[:, -1]) for block in blocks]
    for number in range(rounds + 1):
        for arms, inputs in ((frames, blocks), (planes, highest)):
            for block in inputs:
                for arm in arms:
                    restored = arm.measure(block)
                    if arm.name == "fp8":
                        arm.errors.append(relative_error(shape, block, restored))
                    elif not np.array_equal(restored, block):
                        raise RuntimeError(f"{arm.name} gave other bytes back")
        if number == 0:  # A warm-up.
            for arm in (*frames, *planes):
                arm.encode_s.clear()
                arm.decode_s.clear()
    return [row(shape.dtype, arm, len(blocks)) for arm in (*frames, *planes)]


def relative_error(shape: PartShape, block: Bytes, restored: Bytes) -> npt.NDArray[np.float64]:
    """Sums of squares of the differences and of the elements."""
    was, is_now = (numbers(shape, data) for data in (block, restored))
    return np.array([np.square(was - is_now).sum(), np.square(was).sum()])


def numbers(shape: PartShape, block: Bytes) -> npt.NDArray[np.float64]:
    if shape.dtype == "bfloat16":
        return (block.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return block.view(shape.dtype).astype(np.float64)


def row(dtype: str, arm: Arm, num_blocks: int) -> dict[str, Any]:
    """Medians over blocks and rounds."""
    block_bytes = arm.raw_bytes / (len(arm.encode_s) + num_blocks)
    encode_gb_s = spread([block_bytes / GB / seconds for seconds in arm.encode_s])
    decode_gb_s = spread([block_bytes / GB / seconds for seconds in arm.decode_s])
    ratio = arm.coded_bytes / arm.raw_bytes
    pays_below = fastest_link(ratio=ratio, encode_bytes_per_s=encode_gb_s.median, decode_bytes_per_s=decode_gb_s.median)
    squares = sum(arm.errors, np.zeros(2))
    return {
        "dtype": dtype,
        "of": arm.what,
        "coder": arm.name,
        "ratio": ratio,
        "encode_gb_s": encode_gb_s,
        "decode_gb_s": decode_gb_s,
        "pays_below_gb_s": pays_below if arm.what == "frame" else "",
        "rms_error": float(np.sqrt(squares[0] / squares[1])) if arm.errors else "",
    }


def main() -> None:
    """Measure and report."""
    options = parser((__doc__ or "").splitlines()[0])
    options.add_argument("--rounds", type=int, default=3, metavar="N", help="each over every block (%(default)s)")
    options.add_argument("--dtypes", nargs="+", choices=ITEM_BYTES, default=list(ITEM_BYTES), metavar="TYPE")
    args = options.parse_args()
    model = resolve_model("", default_cache_dir(dict(os.environ)))
    report = Report("encoding", {"model": model.served_name, "num_blocks": NUM_BLOCKS, "rounds": args.rounds})
    for dtype in args.dtypes:
        shape, blocks = sample(model.path, dtype, NUM_BLOCKS)
        report.rows += measure(shape, blocks, args.rounds)
    report.notes.append("pays_below_gb_s: bandwidth of a link for which one thread at either end makes sending faster")
    report.notes.append("rms_error: of all elements, relative to their own root mean square")
    report.finish(args.json)


if __name__ == "__main__":
    main()
