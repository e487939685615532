"""What is encoded comes back, to the bit or within the bound; whatever else is decoded raises EncodingError."""

from __future__ import annotations

import contextlib
import struct
import threading
import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.kv_transfer import fp8_blocks
from kvrelay.kv_transfer.encoding import Encoding, decode, encode, supports
from kvrelay.kv_transfer.part_shape import ITEM_BYTES, EncodingError, PartShape
from kvrelay.v1.cluster_pb2 import KvLayout

SHAPES = st.builds(
    PartShape,
    num_layers=st.integers(1, 3),
    num_kv_heads=st.integers(1, 3),
    block_size_tokens=st.integers(1, 5),
    head_elements=st.integers(1, 9).map(lambda half: 2 * half),
    dtype=st.sampled_from(sorted(ITEM_BYTES)),
)
LARGE = PartShape(num_layers=4, num_kv_heads=3, block_size_tokens=32, head_elements=128, dtype="bfloat16")
AS_IT_IS = 0


def joined(encoding: Encoding, shape: PartShape, parts: Sequence[bytes | memoryview]) -> bytes:
    return b"".join(encode(encoding, shape, parts))


def decoded(encoding: Encoding, shape: PartShape, payload: bytes, num_parts: int) -> list[bytes]:
    targets = [bytearray(shape.num_bytes) for _ in range(num_parts)]
    decode(encoding, shape, payload, [memoryview(target) for target in targets])
    return [bytes(target) for target in targets]


def random_parts(shape: PartShape, num_parts: int, seed: int) -> list[bytes]:
    """Any bits at all, so every kind of floating-point number."""
    numbers = np.random.default_rng(seed)
    return [numbers.bytes(shape.num_bytes) for _ in range(num_parts)]


def normal_parts(shape: PartShape, num_parts: int = 2, scale: float = 1.0) -> list[bytes]:
    """Like a KV cache: numbers around zero, their exponents much alike."""
    values = np.random.default_rng(7).normal(0, scale, (num_parts, shape.num_elements))
    return [bytes(tensor_bytes(torch.from_numpy(row).to(getattr(torch, shape.dtype)))) for row in values]


def tensor_bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1)


def as_float64(shape: PartShape, part: bytes) -> npt.NDArray[np.float64]:
    """`[row, token, half, element]`."""
    tensor = torch.frombuffer(bytearray(part), dtype=getattr(torch, shape.dtype)).double()
    halves: npt.NDArray[np.float64] = tensor.numpy().reshape(shape.num_rows, shape.block_size_tokens, 2, -1)
    return halves


@given(SHAPES, st.integers(0, 4), st.integers(0, 2**32))
def test_any_bits_come_back_from_lossless(shape: PartShape, num_parts: int, seed: int) -> None:
    parts = random_parts(shape, num_parts, seed)
    payload = joined(Encoding.LOSSLESS, shape, parts)
    assert decoded(Encoding.LOSSLESS, shape, payload, num_parts) == parts
    assert len(payload) <= num_parts * shape.num_bytes + 1


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_lossless_keeps_special_numbers_between_ordinary_ones(dtype: str) -> None:
    shape = replace(LARGE, dtype=dtype)
    tensor = torch.from_numpy(np.random.default_rng(3).normal(size=shape.num_elements)).to(getattr(torch, dtype))
    info = torch.finfo(tensor.dtype)
    special = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), info.max, info.min, info.tiny, info.tiny / 4]
    tensor[: len(special)] = torch.tensor(special, dtype=torch.float64).to(tensor.dtype)
    part = bytes(tensor_bytes(tensor))
    payload = joined(Encoding.LOSSLESS, shape, [part])
    assert payload[0] == Encoding.LOSSLESS.value
    assert len(payload) < 0.9 * len(part)
    assert decoded(Encoding.LOSSLESS, shape, payload, 1) == [part]


@pytest.mark.parametrize("num_parts", [1, 3])
def test_planes_longer_than_a_piece_come_back(num_parts: int) -> None:
    shape = replace(LARGE, num_layers=24, dtype="float32")
    parts = normal_parts(shape, num_parts)
    payload = joined(Encoding.LOSSLESS, shape, parts)
    assert payload[0] == Encoding.LOSSLESS.value
    assert decoded(Encoding.LOSSLESS, shape, payload, num_parts) == parts


def test_zeros_become_nearly_nothing() -> None:
    part = bytes(LARGE.num_bytes)
    payload = joined(Encoding.LOSSLESS, LARGE, [part])
    assert len(payload) < 200
    assert decoded(Encoding.LOSSLESS, LARGE, payload, 1) == [part]


@pytest.mark.parametrize("encoding", Encoding)
def test_what_would_not_shrink_or_not_survive_goes_as_it_is(encoding: Encoding) -> None:
    parts = random_parts(LARGE, 2, seed=5)  # Among so many random bits are infinities.
    assert joined(encoding, LARGE, parts) == bytes([AS_IT_IS]) + b"".join(parts)
    assert decoded(encoding, LARGE, joined(encoding, LARGE, parts), 2) == parts


@given(SHAPES, st.integers(1, 3), st.integers(0, 2**32), st.booleans())
def test_fp8_is_within_its_bound(shape: PartShape, num_parts: int, seed: int, any_bits: bool) -> None:
    parts = random_parts(shape, num_parts, seed) if any_bits else normal_parts(shape, num_parts, scale=10.0)
    payload = joined(Encoding.FP8, shape, parts)
    back = decoded(Encoding.FP8, shape, payload, num_parts)
    if payload[0] == AS_IT_IS:
        assert back == parts
        assert any(not np.isfinite(as_float64(shape, part)).all() for part in parts)
        return
    for part, other in zip(parts, back, strict=True):
        assert_within_bound(shape, as_float64(shape, part), as_float64(shape, other))


def assert_within_bound(shape: PartShape, was: npt.NDArray[Any], is_now: npt.NDArray[Any]) -> None:
    info = torch.finfo(getattr(torch, shape.dtype))
    scale = np.maximum(np.abs(was).max(axis=(1, 3), keepdims=True) / 448, 2.0**-126)
    own_rounding = np.maximum(np.abs(is_now) * info.eps / 2, info.smallest_normal * info.eps)
    bound = np.maximum(np.abs(was) / 16, scale / 1024) * (1 + 1e-5) + own_rounding
    assert np.isfinite(is_now).all()
    assert (np.abs(was - is_now) <= bound).all()
    assert (np.signbit(was) == np.signbit(is_now)).all()


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("which", ["max", "smallest_normal", "tiny"])
def test_fp8_at_the_ends_of_a_type(dtype: str, which: str) -> None:
    shape = replace(LARGE, dtype=dtype)
    tensor = torch.zeros(shape.num_elements, dtype=getattr(torch, dtype))
    edge = getattr(torch.finfo(tensor.dtype), which)
    tensor[:4] = torch.tensor([edge, -edge, edge / 2, edge / 256], dtype=torch.float64).to(tensor.dtype)
    part = bytes(tensor_bytes(tensor))
    payload = joined(Encoding.FP8, shape, [part])
    assert payload[0] == Encoding.FP8.value
    [back] = decoded(Encoding.FP8, shape, payload, 1)
    assert_within_bound(shape, as_float64(shape, part), as_float64(shape, back))


def test_fp8_codes_are_torchs() -> None:
    shape = PartShape(num_layers=1, num_kv_heads=1, block_size_tokens=1, head_elements=4096, dtype="float32")
    numbers = np.random.default_rng(1).normal(0, 60, shape.num_elements).astype(np.float32)
    numbers[[0, 2048]] = 448  # The scale is one.
    np.clip(numbers, -448, 448, out=numbers)
    numbers[1:64] *= 1e-4  # Below the smallest normal number of e4m3.
    payload = joined(Encoding.FP8, shape, [numbers.tobytes()])
    assert np.frombuffer(payload[1:9], np.float32).tolist() == [1, 1]
    expected = torch.from_numpy(numbers).to(torch.float8_e4m3fn)
    assert payload[9:] == bytes(tensor_bytes(expected))
    [back] = decoded(Encoding.FP8, shape, payload, 1)
    assert back == bytes(tensor_bytes(expected.float()))


def test_fp8_has_a_scale_for_each_head_layer_and_half() -> None:
    shape = PartShape(num_layers=2, num_kv_heads=2, block_size_tokens=2, head_elements=4, dtype="float32")
    groups = 2.0 ** np.arange(-12, 12, 3).reshape(4, 1, 2, 1)
    numbers = np.broadcast_to(groups, (4, 2, 2, 2)).astype(np.float32)
    payload = joined(Encoding.FP8, shape, [numbers.tobytes()])
    assert np.allclose(np.frombuffer(payload[1:33], np.float32) * 448, groups.reshape(-1))
    assert np.allclose(as_float64(shape, decoded(Encoding.FP8, shape, payload, 1)[0]), numbers)


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("what", [float("inf"), -float("inf"), float("nan")])
def test_fp8_leaves_a_frame_alone_that_has_one_element_that_is_not_finite(dtype: str, what: float) -> None:
    shape = replace(LARGE, dtype=dtype)
    first, second = normal_parts(shape)
    tensor = torch.frombuffer(bytearray(second), dtype=getattr(torch, dtype))
    tensor[-1] = what
    parts = [first, bytes(tensor_bytes(tensor))]
    payload = joined(Encoding.FP8, shape, parts)
    assert payload[0] == AS_IT_IS
    assert decoded(Encoding.FP8, shape, payload, 2) == parts


@pytest.mark.parametrize(("dtype", "ratio"), [("bfloat16", 0.5), ("float16", 0.5), ("float32", 0.25)])
def test_fp8_halves_or_quarters(dtype: str, ratio: float) -> None:
    shape = replace(LARGE, dtype=dtype)
    payload = joined(Encoding.FP8, shape, normal_parts(shape))
    assert len(payload) == pytest.approx(2 * shape.num_bytes * ratio, rel=0.01)


@pytest.mark.parametrize("encoding", Encoding)
def test_addresses_need_not_be_aligned_and_neighbours_stay(encoding: Encoding) -> None:
    part = normal_parts(LARGE, 1)[0]
    payload = b"xyz" + joined(encoding, LARGE, [memoryview(b"a" + part)[1:]])
    memory = bytearray(b"\xaa" * (LARGE.num_bytes + 2))
    decode(encoding, LARGE, memoryview(payload)[3:], [memoryview(memory)[1:-1]])
    assert memory[0] == memory[-1] == 0xAA
    assert [bytes(memory[1:-1])] == decoded(encoding, LARGE, payload[3:], 1)


@pytest.mark.parametrize("encoding", Encoding)
def test_views_of_a_segment_can_be_released_afterwards(encoding: Encoding) -> None:
    memory = bytearray(normal_parts(LARGE, 1)[0])
    view = memoryview(memory)
    pieces = encode(encoding, LARGE, [view])
    view.release()
    target = memoryview(memory)
    decode(encoding, LARGE, b"".join(pieces), [target])
    with pytest.raises(EncodingError) as caught:
        decode(encoding, LARGE, b"".join(pieces)[:-1], [target])
    target.release()
    memory.append(0)  # Not possible while somebody has a view.
    assert caught.value.args


@pytest.mark.parametrize("encoding", Encoding)
@given(data=st.data())
def test_a_payload_that_is_cut_or_longer_is_refused_and_nothing_written(
    encoding: Encoding, data: st.DataObject
) -> None:
    shape = replace(LARGE, num_layers=1, num_kv_heads=1)
    payload = joined(encoding, shape, normal_parts(shape))
    change = data.draw(st.integers(1, len(payload)) | st.binary(min_size=1, max_size=9))
    assert_refused(encoding, shape, payload[:-change] if isinstance(change, int) else payload + change)


def assert_refused(encoding: Encoding, shape: PartShape, payload: bytes, num_parts: int = 2) -> None:
    targets = [bytearray(b"\xaa" * shape.num_bytes) for _ in range(num_parts)]
    with pytest.raises(EncodingError):
        decode(encoding, shape, payload, [memoryview(target) for target in targets])
    assert all(target == b"\xaa" * shape.num_bytes for target in targets)


@pytest.mark.parametrize("encoding", Encoding)
@given(SHAPES, st.sampled_from([0, 1, 2, 3]), st.binary(max_size=300), st.integers(0, 3))
def test_garbage_raises_nothing_but_encoding_error(
    encoding: Encoding, shape: PartShape, kind: int, garbage: bytes, num_parts: int
) -> None:
    with contextlib.suppress(EncodingError):
        decoded(encoding, shape, bytes([kind]) + garbage, num_parts)


@pytest.mark.parametrize("encoding", Encoding)
@given(data=st.data())
def test_a_damaged_payload_raises_nothing_but_encoding_error(encoding: Encoding, data: st.DataObject) -> None:
    shape = replace(LARGE, num_layers=1, num_kv_heads=1)
    payload = bytearray(joined(encoding, shape, normal_parts(shape)))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, 80) | st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(EncodingError):
        decoded(encoding, shape, bytes(payload), 2)


def test_a_way_of_coding_that_was_not_agreed_is_refused() -> None:
    parts = normal_parts(LARGE)
    assert_refused(Encoding.LOSSLESS, LARGE, joined(Encoding.FP8, LARGE, parts))
    assert_refused(Encoding.FP8, LARGE, joined(Encoding.LOSSLESS, LARGE, parts))


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("num_parts", [0, 1, 3])
def test_another_number_of_blocks_is_refused(encoding: Encoding, num_parts: int) -> None:
    assert_refused(encoding, LARGE, joined(encoding, LARGE, normal_parts(LARGE)), num_parts)


def lying_planes(declared_bytes: int, real_bytes: int) -> bytes:
    """Two planes: one as it is, one a zstd frame of zeros, whose header is then changed to declare another size."""
    frame = bytearray(zstandard.ZstdCompressor().compress(bytes(1 << 20)))
    assert zstandard.get_frame_parameters(bytes(frame)).content_size == 1 << 20
    field = bytes(frame).index((1 << 20).to_bytes(4, "little"))
    frame[field : field + 4] = declared_bytes.to_bytes(4, "little")
    plane = bytes(real_bytes)
    return b"\1" + struct.pack("<2I", len(plane), len(frame)) + plane + bytes(frame)


@pytest.mark.parametrize("declared_bytes", [LARGE.num_elements, (1 << 32) - 1, 1 << 20, 70_000])
def test_a_frame_that_grows_beyond_its_blocks_is_refused(declared_bytes: int) -> None:
    assert_refused(Encoding.LOSSLESS, LARGE, lying_planes(declared_bytes, LARGE.num_elements), num_parts=1)


def test_a_frame_without_a_size_is_refused() -> None:
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(LARGE.num_elements))
    planes = struct.pack("<2I", LARGE.num_elements, len(frame)) + bytes(LARGE.num_elements) + frame
    assert_refused(Encoding.LOSSLESS, LARGE, b"\1" + planes, num_parts=1)


def test_no_memory_is_taken_for_what_a_hostile_frame_declares() -> None:
    payload = lying_planes((1 << 32) - 1, LARGE.num_elements)
    tracemalloc.start()
    try:
        assert_refused(Encoding.LOSSLESS, LARGE, payload, num_parts=1)
        assert tracemalloc.get_traced_memory()[1] < 8 * LARGE.num_bytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e-39, 1e37])
def test_a_scale_that_no_encoder_writes_is_refused(scale: float) -> None:
    payload = bytearray(joined(Encoding.FP8, LARGE, normal_parts(LARGE)))
    payload[5:9] = np.float32(scale).tobytes()
    assert_refused(Encoding.FP8, LARGE, bytes(payload))


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_the_largest_scale_does_not_overflow(dtype: str) -> None:
    shape = replace(LARGE, dtype=dtype)
    scale = fp8_blocks._LARGEST_SCALE[dtype]
    codes = b"\x7e" * shape.num_elements
    payload = b"\2" + np.full((shape.num_rows, 2), scale, np.float32).tobytes() + codes
    values = as_float64(shape, decoded(Encoding.FP8, shape, payload, 1)[0])
    assert np.allclose(values, torch.finfo(getattr(torch, dtype)).max, rtol=0.01)


@pytest.mark.parametrize("encoding", Encoding)
def test_what_the_caller_got_wrong_is_no_encoding_error(encoding: Encoding) -> None:
    payload = joined(encoding, LARGE, normal_parts(LARGE, 1))
    for call in (
        lambda: encode(encoding, LARGE, [bytes(LARGE.num_bytes - 1)]),
        lambda: decode(encoding, LARGE, payload, [memoryview(bytearray(LARGE.num_bytes + 1))]),
        lambda: decode(encoding, LARGE, payload, [memoryview(bytes(LARGE.num_bytes))]),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            call()
        assert not isinstance(caught.value, EncodingError)


def test_only_floating_point_blocks_are_supported_and_fp8_needs_two_halves() -> None:
    layout = KvLayout(dtype="bfloat16", num_layers=2, num_kv_heads=1, head_elements=6, block_size_tokens=4)
    assert all(supports(encoding, layout) for encoding in Encoding)
    assert PartShape.of(layout, 2).num_bytes == 2 * 6 * 4 * 2
    layout.head_elements = 7
    assert supports(Encoding.LOSSLESS, layout)
    assert not supports(Encoding.FP8, layout)
    with pytest.raises(ValueError, match="7 elements"):
        encode(Encoding.FP8, PartShape.of(layout, 1), [bytes(7 * 4 * 2)])
    layout.dtype = "uint8"
    assert not any(supports(encoding, layout) for encoding in Encoding)
    with pytest.raises(ValueError, match="uint8"):
        PartShape.of(layout, 1)
    with pytest.raises(ValueError, match="empty"):
        replace(LARGE, num_layers=0)


@pytest.mark.parametrize("encoding", Encoding)
def test_threads_do_not_disturb_each_other(encoding: Encoding) -> None:
    num_threads = 8
    parts = normal_parts(LARGE, num_threads)
    expected = [joined(encoding, LARGE, [part]) for part in parts]
    begin = threading.Barrier(num_threads)

    def work(number: int) -> bool:
        begin.wait(10)
        payloads = [joined(encoding, LARGE, [parts[number]]) for _ in range(20)]
        blocks = [decoded(encoding, LARGE, payload, 1) for payload in payloads]
        return payloads == [expected[number]] * 20 and blocks == [decoded(encoding, LARGE, expected[number], 1)] * 20

    with ThreadPoolExecutor(num_threads) as threads:
        assert all(threads.map(work, range(num_threads)))
