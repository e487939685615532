"""Frames land once each, from any thread, and nothing lands after the end."""

import threading
from collections.abc import Iterator, Sequence

import pytest

from kvrelay.kv_transfer.landing import LandedHandler, Landing, LandingClosedError, OverlapError
from kvrelay.kv_transfer.segment import Segment, size_for

LAYERS, LAYER_BYTES = 4, 8
SLOT_BYTES = LAYERS * LAYER_BYTES


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment.create(size_for(4, SLOT_BYTES))
    segment.configure(SLOT_BYTES)
    yield segment
    segment.close()


def ignore_landed(_blocks: Sequence[int], _layers: int, _is_last: bool) -> None:
    pass


def landing_of(segment: Segment, on_landed: LandedHandler = ignore_landed) -> Landing:
    """Blocks 5 and 6 are wanted, in slots 2 and 0."""
    return Landing(segment, {5: 2, 6: 0}, LAYER_BYTES, on_landed)


def test_what_lands_is_told_and_when_nothing_is_missing(segment: Segment) -> None:
    told: list[tuple[Sequence[int], int, bool]] = []
    landing = landing_of(segment, lambda *landed: told.append(landed))
    landing.write(4, (0, 4), [bytes(2 * SLOT_BYTES)])
    landing.write(5, (0, 4), [bytes(SLOT_BYTES)])
    assert landing.write(6, (0, 4), [bytes(SLOT_BYTES)], lambda: False) is None
    landing.write(6, (1, 3), [bytes(3 * LAYER_BYTES)])
    landing.write(6, (0, 1), [bytes(LAYER_BYTES)])
    assert told == [([5], 0b1111, False), ([6], 0b1110, False), ([6], 0b0001, True)]


def test_the_end_waits_until_what_landed_is_told(segment: Segment) -> None:
    telling, may_go_on, told = threading.Event(), threading.Event(), threading.Event()

    def tell(_blocks: Sequence[int], _layers: int, _is_last: bool) -> None:
        telling.set()
        may_go_on.wait(10)
        told.set()

    landing = landing_of(segment, tell)
    writer = threading.Thread(target=lambda: landing.write(5, (0, 4), [bytes(SLOT_BYTES)]))
    writer.start()
    assert telling.wait(10)
    threading.Timer(0.05, may_go_on.set).start()
    landing.close()
    assert told.is_set()
    writer.join()


def test_layers_of_blocks_go_to_their_slots(segment: Segment) -> None:
    landing = landing_of(segment)
    assert landing.write(4, (1, 2), [b"x" * 16, b"a" * 16, b"b" * 16]) == [5, 6], "block 4 is not wanted"
    assert bytes(segment.slot_view(2)) == bytes(8) + b"a" * 16 + bytes(8)
    assert bytes(segment.slot_view(0)) == bytes(8) + b"b" * 16 + bytes(8)
    assert bytes(segment.slot_view(1)) == bytes(SLOT_BYTES)


def test_what_comes_twice_is_not_written_again(segment: Segment) -> None:
    landing = landing_of(segment)
    assert landing.write(5, (0, 1), [b"a" * 8]) == [5]
    assert landing.write(5, (0, 1), [b"z" * 8]) == []
    assert bytes(segment.slot_view(2, 0, 8)) == b"a" * 8


def test_layers_that_overlap_are_refused(segment: Segment) -> None:
    landing = landing_of(segment)
    landing.write(5, (0, 2), [b"a" * 16])
    with pytest.raises(OverlapError):
        landing.write(5, (1, 2), [b"b" * 16])
    assert landing.write(5, (2, 2), [b"c" * 16]) == [5]


def test_a_source_that_changed_has_not_landed_and_may_come_again(segment: Segment) -> None:
    landing = landing_of(segment)
    assert landing.write(5, (0, 4), [b"a" * 32], lambda: False) is None
    assert landing.write(5, (0, 4), [b"b" * 32], lambda: True) == [5]
    assert bytes(segment.slot_view(2)) == b"b" * 32


def test_nothing_lands_after_the_end(segment: Segment) -> None:
    landing = landing_of(segment)
    landing.close()
    landing.close()
    with pytest.raises(LandingClosedError):
        landing.write(5, (0, 4), [b"a" * 32])
    assert bytes(segment.slot_view(2)) == bytes(SLOT_BYTES)


def test_the_end_waits_for_what_is_being_written(segment: Segment) -> None:
    landing = landing_of(segment)
    writing, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def valid() -> bool:
        writing.set()
        return may_end.wait(10)

    def close() -> None:
        landing.close()
        ended.set()

    threads = [threading.Thread(target=lambda: landing.write(5, (0, 4), [b"a" * 32], valid))]
    threads[0].start()
    assert writing.wait(10)
    threads.append(threading.Thread(target=close))
    threads[1].start()
    assert not ended.wait(0.05)
    may_end.set()
    assert ended.wait(10)
    for thread in threads:
        thread.join()


def test_threads_share_the_layers_of_a_block(segment: Segment) -> None:
    landing = landing_of(segment)
    written: list[int] = []

    def write(layer: int) -> None:
        written.extend(landing.write(5, (layer, 1), [bytes([layer]) * 8]) or ())

    threads = [threading.Thread(target=write, args=(layer % LAYERS,)) for layer in range(4 * LAYERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written == [5] * LAYERS
    assert bytes(segment.slot_view(2)) == b"".join(bytes([layer]) * 8 for layer in range(LAYERS))
