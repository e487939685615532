"""The ranks' side of the connector, called as vLLM's model runner calls it, with real tensors and pipes."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from kvrelay.engine.reports import RankQuorum
from kvrelay.kv_transfer.connector_plan import Copies
from kvrelay.kv_transfer.engine_pipes import CLOSED, LOADED, SAVED, Pipe, RankReport, ReportReader
from kvrelay.kv_transfer.rank_copier import RankLayout
from kvrelay.kv_transfer.segment import Segment, size_for
from kvrelay.kv_transfer.vllm_connector import KvRelayConnector, StepCopies

LAYERS, BLOCKS, HEADS, TOKENS, ELEMENTS = 5, 6, 2, 4, 8
LAYER_BYTES = HEADS * TOKENS * ELEMENTS * 2
NAMES = [f"model.layers.{i}.attn" for i in range(LAYERS)]
NOTHING: Any = None
"""What the connector does not look at."""


class Rank:
    """One rank of an engine whose forward pass fills a layer's blocks with the layer's number."""

    def __init__(
        self,
        segment: Segment,
        pipe: Pipe,
        *,
        layer_groups: int,
        half_batches: bool = False,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        extra = {"segment_path": segment.path, "report_path": pipe.writer_path, "layer_groups": layer_groups}
        config: Any = SimpleNamespace(
            kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra),
            parallel_config=SimpleNamespace(rank=rank, tensor_parallel_size=num_ranks, use_ubatching=half_batches),
            model_config=SimpleNamespace(get_total_num_kv_heads=lambda: HEADS),
        )
        shape = (BLOCKS, HEADS // num_ranks, TOKENS, ELEMENTS)
        self.caches = {name: torch.zeros(shape, dtype=torch.bfloat16) for name in NAMES}
        self.connector = KvRelayConnector(config, KVConnectorRole.WORKER, NOTHING)
        self.connector.register_kv_caches(self.caches)
        self.reader = ReportReader(pipe.read_fd)

    def reports(self) -> list[RankReport]:
        return list(self.reader.read())

    def begin(self, copies: Copies) -> None:
        metadata = StepCopies(copies)
        self.connector.handle_preemptions(metadata)
        self.connector.bind_connector_metadata(metadata)
        if copies.loads:
            self.connector.start_load_kv(NOTHING)

    def compute(self, layer: int) -> None:
        self.caches[NAMES[layer]].fill_(layer + 1)
        self.connector.save_kv_layer(NAMES[layer], self.caches[NAMES[layer]], NOTHING)

    def end(self, copies: Copies) -> None:
        if not copies.loads:  # vLLM 0.32 starts loads after the pass unless the pass needs them.
            self.connector.start_load_kv(NOTHING)
        self.connector.wait_for_save()
        self.connector.clear_connector_metadata()


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment.create(size_for(8, LAYERS * LAYER_BYTES))
    yield segment
    segment.close()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def layer_content(layer: int) -> bytes:
    return torch.full([LAYER_BYTES // 2], layer + 1, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()


def complete_layers(segment: Segment, slot: int) -> list[int]:
    """Layers of the slot that hold what the pass computed."""
    segment.configure(LAYERS * LAYER_BYTES)
    contents = [bytes(segment.slot_view(slot, layer * LAYER_BYTES, LAYER_BYTES)) for layer in range(LAYERS)]
    return [layer for layer, content in enumerate(contents) if content == layer_content(layer)]


def test_layers_of_a_prompt_are_saved_and_reported_while_later_ones_are_computed(segment: Segment, pipe: Pipe) -> None:
    rank = Rank(segment, pipe, layer_groups=2)
    copies = Copies(streamed=[(3, 1, 7, 0), (4, 2, 7, 1)], saves=[(6, 5, 8, 9)])
    for _ in range(2):
        rank.begin(copies)
        for layer in range(2):
            rank.compute(layer)
        assert rank.reports() == []
        rank.compute(2)
        assert rank.reports() == [RankReport(SAVED, 0, 7, block, 3 + block, 0, 3) for block in range(2)]
        assert complete_layers(segment, 3) == complete_layers(segment, 4) == [0, 1, 2]
        rank.compute(3)
        rank.compute(4)
        assert rank.reports() == [RankReport(SAVED, 0, 7, block, 3 + block, 3, 2) for block in range(2)]
        assert complete_layers(segment, 6) == [], "generated blocks are saved whole, at the end"
        rank.end(copies)
        assert rank.reports() == [RankReport(SAVED, 0, 8, 9, 6, 0, LAYERS)]
        assert complete_layers(segment, 6) == list(range(LAYERS))
        for slot in (3, 4, 6):
            segment.slot_view(slot)[:] = bytes(LAYERS * LAYER_BYTES)
    rank.connector.shutdown()


@pytest.mark.parametrize("options", [{"layer_groups": 1}, {"layer_groups": 5, "half_batches": True}])
def test_whole_blocks_are_saved_after_the_pass(segment: Segment, pipe: Pipe, options: dict[str, int]) -> None:
    """The first half batch calls with layers that the second has not computed."""
    rank = Rank(segment, pipe, **options)  # type: ignore[arg-type]
    copies = Copies(streamed=[(3, 1, 7, 0)])
    rank.begin(copies)
    for _ in range(2):
        for layer in range(LAYERS):
            rank.compute(layer)
    assert rank.reports() == []
    rank.end(copies)
    assert rank.reports() == [RankReport(SAVED, 0, 7, 0, 3, 0, LAYERS)]
    assert complete_layers(segment, 3) == list(range(LAYERS))
    rank.connector.shutdown()


def test_loads_are_over_before_the_pass_and_closed_comes_before_everything(segment: Segment, pipe: Pipe) -> None:
    rank = Rank(segment, pipe, layer_groups=2)
    assert RankLayout.read(segment.header).num_layers == LAYERS
    segment.configure(LAYERS * LAYER_BYTES)
    segment.slot_view(2)[:] = b"".join(map(layer_content, range(LAYERS)))
    copies = Copies(loads=[(2, 4)], loaded=[(7, 1)], closed=[5])
    rank.begin(copies)
    assert rank.reports() == [RankReport(CLOSED, 0, 5, 0, 0), RankReport(LOADED, 0, 7, 1, 0)]
    for layer, name in enumerate(NAMES):
        assert torch.all(rank.caches[name][4] == layer + 1)
        assert not torch.any(rank.caches[name][:4])
    rank.end(copies)
    rank.connector.shutdown()


def test_a_part_is_complete_when_every_rank_has_saved_its_heads(segment: Segment, pipe: Pipe) -> None:
    ranks = [Rank(segment, pipe, layer_groups=2, rank=rank, num_ranks=2) for rank in range(2)]
    assert RankLayout.read(segment.header).num_kv_heads == HEADS
    quorum, copies = RankQuorum(2), Copies(streamed=[(3, 1, 7, 0)])
    for number, rank in enumerate(ranks):
        rank.begin(copies)
        for layer in range(LAYERS):
            rank.compute(layer)
        complete = [report for report in ranks[0].reports() if quorum.complete(report)]
        assert [(report.first_layer, report.num_layers) for report in complete] == ([(0, 3), (3, 2)] if number else [])
        assert complete_layers(segment, 3) == (list(range(LAYERS)) if number else [])
        rank.end(copies)
        rank.connector.shutdown()


def test_several_groups_keep_full_cuda_graphs_away() -> None:
    assert KvRelayConnector.requires_piecewise_for_cudagraph({"layer_groups": 2})
    assert not KvRelayConnector.requires_piecewise_for_cudagraph({"layer_groups": 1})
