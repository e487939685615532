"""Ranks of any size read what ranks of any other size have written: the store's layout is canonical."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvrelay.kv_transfer import rank_copier
from kvrelay.kv_transfer.rank_copier import RankCopier, RankLayout, UnsupportedKvCacheError
from kvrelay.kv_transfer.segment import HEADER_BYTES, Segment, size_for

LAYERS, BLOCKS, HEADS, TOKENS, ELEMENTS = 3, 8, 4, 2, 6
SLOT_BYTES = LAYERS * HEADS * TOKENS * ELEMENTS * 2
NUM_SLOTS = 10


@pytest.fixture(autouse=True, params=["as on a CPU", "as on a GPU"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the CPU stand in for the GPU's: the copies are the same calls."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(rank_copier, "_is_on_cpu", lambda _tensor: False)


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment.create(size_for(NUM_SLOTS, SLOT_BYTES))
    yield segment
    segment.close()


def caches(num_ranks: int, *, fill: bool) -> list[dict[str, torch.Tensor]]:
    """KV caches of every rank; filled ones hold the same model-wide values however many ranks share them."""
    torch.manual_seed(0)
    layers = [torch.rand(BLOCKS, HEADS, TOKENS, ELEMENTS).to(torch.bfloat16) for _ in range(LAYERS)]
    per_rank = max(1, HEADS // num_ranks)
    ranks = []
    for rank in range(num_ranks):
        first = rank * HEADS // num_ranks
        part = [layer[:, first : first + per_rank].contiguous() for layer in layers]
        ranks.append({str(i): t if fill else torch.zeros_like(t) for i, t in enumerate(part)})
    return ranks


def copiers(segment: Segment, ranks: list[dict[str, torch.Tensor]]) -> list[RankCopier]:
    return [RankCopier(segment, cache, rank, len(ranks), HEADS) for rank, cache in enumerate(ranks)]


@pytest.mark.parametrize("num_readers", [1, 2, 4, 8])
@pytest.mark.parametrize("num_writers", [1, 2, 4, 8])
def test_what_some_ranks_wrote_other_ranks_read(segment: Segment, num_writers: int, num_readers: int) -> None:
    written, expected, read = (
        caches(num_writers, fill=True),
        caches(num_readers, fill=True),
        caches(num_readers, fill=False),
    )
    # A run of three, a run that jumps in the store, a run that jumps in the engine.
    blocks, slots = [1, 2, 3, 4, 6], [5, 6, 7, 0, 1]
    for copier in copiers(segment, written):
        copier.save(zip(slots, blocks, strict=True))
    for copier in copiers(segment, read):
        copier.load(zip(slots, blocks, strict=True))
    for rank in range(num_readers):
        for layer, tensor in read[rank].items():
            assert torch.equal(tensor[blocks], expected[rank][layer][blocks])
            assert not tensor[[0, 5, 7]].any(), "a block nobody asked for was written"


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_a_slot_has_the_same_bytes_however_many_ranks_wrote_it(segment: Segment, num_ranks: int) -> None:
    [whole] = caches(1, fill=True)
    for copier in copiers(segment, caches(num_ranks, fill=True)):
        copier.save([(4, 2)])
    expected = b"".join(whole[str(layer)][2].view(torch.uint8).numpy().tobytes() for layer in range(LAYERS))
    assert bytes(segment.slot_view(4)) == expected


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_a_rank_writes_its_own_heads_only(segment: Segment, num_ranks: int) -> None:
    """Every byte is written by one rank, or, with more ranks than heads, by all those that hold its head."""
    ranks = caches(num_ranks, fill=True)
    num_writers = [0] * SLOT_BYTES
    for rank, copier in enumerate(copiers(segment, ranks)):
        written = [torch.full_like(layer, -1.0) for layer in ranks[rank].values()]
        for cache, ones in zip(ranks[rank].values(), written, strict=True):
            cache.copy_(ones)
        segment.slot_view(4)[:] = bytes(SLOT_BYTES)
        copier.save([(4, 2)], range(1))
        copier.save([(4, 2)], range(1, LAYERS))
        # -1 in bfloat16 has no byte that is 0.
        num_writers = [count + bool(byte) for count, byte in zip(num_writers, segment.slot_view(4), strict=True)]
    assert set(num_writers) == {max(1, num_ranks // HEADS)}


def test_a_slot_holds_layer_head_token_element(segment: Segment) -> None:
    [cache] = caches(1, fill=True)
    copier = RankCopier(segment, cache, 0, 1, HEADS)
    copier.save([(4, 2)])
    expected = b"".join(cache[str(layer)][2].view(torch.uint8).numpy().tobytes() for layer in range(LAYERS))
    assert bytes(segment.slot_view(4)) == expected
    assert not any(bytes(segment.slot_view(3)))
    assert not any(bytes(segment.slot_view(5)))


def test_layers_are_saved_apart(segment: Segment) -> None:
    [cache] = caches(1, fill=True)
    copier = RankCopier(segment, cache, 0, 1, HEADS)
    copier.populate()
    copier.save([(4, 2), (5, 3), (9, 0)], range(1, 2))
    layer_bytes = SLOT_BYTES // LAYERS
    for slot, block in [(4, 2), (5, 3), (9, 0)]:
        assert (
            bytes(segment.slot_view(slot, layer_bytes, layer_bytes))
            == cache["1"][block].view(torch.uint8).numpy().tobytes()
        )
        assert not any(bytes(segment.slot_view(slot, 0, layer_bytes)))
        assert not any(bytes(segment.slot_view(slot, 2 * layer_bytes)))
    for layers in (range(1), range(2, 3)):
        copier.save([(4, 2), (5, 3), (9, 0)], layers)
    for layer in cache.values():
        layer.zero_()
    copier.load([(4, 2), (5, 3), (9, 0)])
    [expected] = caches(1, fill=True)
    assert all(torch.equal(cache[name][[2, 3, 0]], expected[name][[2, 3, 0]]) for name in cache)


def test_the_layout_reaches_the_worker_through_the_header(segment: Segment) -> None:
    with pytest.raises(ValueError, match="has not told"):
        RankLayout.read(segment.header)
    [cache] = caches(1, fill=False)
    layout = RankCopier(segment, cache, 0, 1, HEADS).layout
    layout.write(segment.header)
    assert RankLayout.read(segment.header) == layout
    assert layout == RankLayout(
        dtype="bfloat16",
        format="cpu-BHNC",
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_elements=ELEMENTS,
        block_size_tokens=TOKENS,
        slot_bytes=SLOT_BYTES,
        num_engine_blocks=BLOCKS,
        num_ranks=1,
    )


def test_every_rank_tells_the_same_layout(segment: Segment) -> None:
    layouts = [copier.layout for copier in copiers(segment, caches(2, fill=False))]
    assert layouts[0] == layouts[1]
    assert layouts[0].num_kv_heads == HEADS


def test_layers_of_different_shape_are_refused(segment: Segment) -> None:
    cache = {"a": torch.zeros(2, 2, 2, 2), "b": torch.zeros(2, 2, 2, 4)}
    with pytest.raises(UnsupportedKvCacheError, match="different"):
        RankCopier(segment, cache, 0, 1, 2)


def test_scattered_blocks_are_refused(segment: Segment) -> None:
    cache = {"a": torch.zeros(2, 3, 2, 2).transpose(1, 2)}
    with pytest.raises(UnsupportedKvCacheError, match="contiguous"):
        RankCopier(segment, cache, 0, 1, 2)


def test_a_store_too_small_for_one_block_says_so() -> None:
    segment = Segment.create(HEADER_BYTES + SLOT_BYTES - 1)
    [cache] = caches(1, fill=False)
    with pytest.raises(ValueError, match="--kv-host-bytes"):
        RankCopier(segment, cache, 0, 1, HEADS)
    segment.close()
