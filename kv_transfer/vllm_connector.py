"""The KV connector that vLLM loads: copies blocks between the engine and the host block store.

A request carries its plan in `kv_transfer_params` (`kvrelay.engine.base.KvPlan`). The scheduler side turns plans
into copies, the ranks carry them out and report over a pipe. No network, no hashing and no waiting here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from kvrelay.kv_transfer.connector_plan import ConnectorPlan, Copies
from kvrelay.kv_transfer.copy_reports import CopyReports, CudaCopyReports
from kvrelay.kv_transfer.engine_pipes import CLOSED, LOADED, SAVED, GrantReader, RankReport, ReportWriter
from kvrelay.kv_transfer.generated_before import GrammarReplay
from kvrelay.kv_transfer.layer_groups import LayerGroups
from kvrelay.kv_transfer.rank_copier import RankCopier
from kvrelay.kv_transfer.segment import Segment

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import KVConnectorBlockState, SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


class StepCopies(KVConnectorMetadata):
    """One step's copies, on their way from the scheduler to the ranks."""

    def __init__(self, copies: Copies) -> None:
        self.copies = copies


class KvRelayConnector(KVConnectorBase_V1):
    """vLLM calls the first half in the scheduler's process, the second in every rank's."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config
        if role is KVConnectorRole.SCHEDULER:
            self._plan = ConnectorPlan(
                vllm_config.cache_config.block_size,
                # Drafted tokens may be rejected after their KV was written.
                save_generated=vllm_config.speculative_config is None,
            )
            self._grants = GrantReader(extra["grant_path"])
            self._grammars = GrammarReplay()
        else:
            self._segment = Segment.open(extra["segment_path"])
            self._writer = ReportWriter(extra["report_path"])
            self._reports = CopyReports(self._writer)

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that does not happen is a block computed again elsewhere."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """`save_kv_layer` is not called inside full CUDA graphs."""
        return _num_layer_groups(extra_config) > 1

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        """Blocks of one layer are contiguous, heads before tokens: the store's own order."""
        return "LBHNC"

    # The scheduler's side.

    def on_new_request(self, request: Request) -> None:
        if request.kv_transfer_params is not None:
            self._plan.add(request.request_id, request.kv_transfer_params)
            self._grammars.add(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        self._grammars.replay(request)
        return self._plan.matched_tokens(request.request_id, num_computed_tokens), False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self._plan.allocated(request.request_id, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        self._plan.grant(self._grants.read())
        blocks = scheduler_output.kv_connector_block_state
        assert blocks is not None
        scheduled = scheduler_output.num_scheduled_tokens
        cached = scheduler_output.scheduled_cached_reqs
        computed = [(new.req_id, new.num_computed_tokens) for new in scheduler_output.scheduled_new_reqs]
        computed += zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        for request_id, num_computed in computed:
            self._plan.scheduled(
                request_id,
                num_computed + scheduled[request_id],
                partial(_attention_blocks, blocks, request_id),
            )
        return StepCopies(self._plan.take())

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._plan.finished(request.request_id)
        self._grammars.discard(request.request_id)
        return False, None

    # The ranks' side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        parallel = self._vllm_config.parallel_config
        model = self._vllm_config.model_config
        self._rank = parallel.rank % parallel.tensor_parallel_size
        self._copier = RankCopier(
            self._segment,
            kv_caches,
            self._rank,
            parallel.tensor_parallel_size,
            model.get_total_num_kv_heads(),
        )
        self._copier.populate()
        if next(iter(kv_caches.values())).is_cuda:
            self._reports = CudaCopyReports(self._writer, self._copier.pool_address, self._copier.pool_bytes)
        num_groups = _num_layer_groups(self._kv_transfer_config.kv_connector_extra_config)
        # Of two half batches the first one's layers come before the second is computed.
        self._groups = LayerGroups(kv_caches, 1 if parallel.use_ubatching else num_groups)
        if self._rank == 0:
            self._copier.layout.write(self._segment.header)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Called first in every step: what is closed has no copies after those so far."""
        assert isinstance(kv_connector_metadata, StepCopies)
        closed = kv_connector_metadata.copies.closed
        self._reports.report(RankReport(CLOSED, self._rank, ticket, 0, 0) for ticket in closed)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Called before the forward pass; `start_load_kv` comes after it when there is nothing to load."""
        super().bind_connector_metadata(connector_metadata)
        self._groups.begin()

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        copies = self._copies()
        self._copier.load(copies.loads)
        self._reports.report(RankReport(LOADED, self._rank, ticket, count, 0) for ticket, count in copies.loaded)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads come before the forward pass, in its own stream."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **kwargs: Any
    ) -> None:
        self._save(self._groups.computed(layer_name), self._copies().streamed)

    def wait_for_save(self) -> None:
        copies = self._copies()
        self._save(self._groups.rest(), copies.streamed)
        self._save(range(self._copier.layout.num_layers), copies.saves)
        self._reports.fence()

    def _save(self, layers: range, saves: Sequence[tuple[int, int, int, int]]) -> None:
        if not layers or not saves:
            return
        with self._reports.saving():
            self._copier.save(((slot, block) for slot, block, _, _ in saves), layers)
        self._reports.report(
            RankReport(SAVED, self._rank, ticket, index, slot, layers.start, len(layers))
            for slot, _, ticket, index in saves
        )

    def shutdown(self) -> None:
        if self.role is KVConnectorRole.SCHEDULER:
            self._grants.close()
        else:
            self._reports.close()

    def _copies(self) -> Copies:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepCopies)
        return metadata.copies


def _num_layer_groups(extra_config: dict[str, Any]) -> int:
    return int(extra_config["layer_groups"])


def _attention_blocks(blocks: KVConnectorBlockState, request_id: str) -> list[int]:
    """The request's engine blocks; a connector without hybrid memory support has one group."""
    return blocks.resolve_block_ids(request_id)[0]
