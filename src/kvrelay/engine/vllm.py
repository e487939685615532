"""The engine adapter for vLLM: speaks to vLLM's engine core directly, token ids only.

vLLM's `AsyncLLM` puts three things together: input processing, a client of the engine core (which runs in its own
process), output processing. The first and the last live in the coordinator here; a worker needs the client alone,
and gets all outputs of an engine step in one message from it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass

from vllm import AsyncEngineArgs
from vllm.config import KVTransferConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.core_client import AsyncMPClient, EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError
from vllm.v1.executor import Executor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from kvrelay import logprobs, sampling
from kvrelay.block_hash import layout_fingerprint
from kvrelay.engine.base import (
    Engine,
    EngineDeadError,
    EngineInfo,
    EngineRequest,
    EngineStep,
    KvReport,
    KvReportKind,
)
from kvrelay.engine.model_identity import model_identity
from kvrelay.engine.processes import EngineProcesses
from kvrelay.engine.reports import RankQuorum
from kvrelay.kv_transfer import vllm_connector
from kvrelay.kv_transfer.engine_pipes import Pipe, ReportReader, write_grants
from kvrelay.kv_transfer.generated_before import NUM_GENERATED_TOKENS
from kvrelay.kv_transfer.rank_copier import RankLayout
from kvrelay.kv_transfer.segment import Segment
from kvrelay.v1 import cluster_pb2, common_pb2, worker_pb2

_EVENTS = {
    EngineCoreEventType.QUEUED: "queued",
    EngineCoreEventType.SCHEDULED: "scheduled",
    EngineCoreEventType.PREEMPTED: "preempted",
}

_FINISH_REASONS = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: common_pb2.FINISH_REASON_ABORT,
    FinishReason.ERROR: common_pb2.FINISH_REASON_ERROR,
    FinishReason.REPETITION: common_pb2.FINISH_REASON_REPETITION,
}

_OTHER_PARALLELISM = ("pipeline", "prefill_context", "decode_context")

_CPU_LAYER_GROUPS = 6
_CPU_WORKER = "kvrelay.engine.vllm_cpu_worker.ContinuingCPUWorker"
_GPU_WORKER = "kvrelay.engine.vllm_gpu_worker.ContinuingGPUWorker"
"""Imported by the engine core only."""
_SHUTDOWN_S = 4.0
"""The engine core gets this long before it is killed; alone it needs 2.5 s to leave Python, several ranks need more."""


class EngineOptionError(ValueError):
    """An engine option that cannot work here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmEngineConfig:
    """What to load and how. `options` are command line options as `vllm serve` takes them."""

    model: str
    served_model_name: str
    options: Sequence[str] = ()
    layer_groups: int | None = None
    """In how many pieces the layers of a prompt's blocks are saved while they are computed.

    By default several on a CPU, and one elsewhere: more would rule out full CUDA graphs.
    """


class VllmEngine(Engine):
    """One vLLM engine core and its ranks, as child processes."""

    def __init__(self, config: VllmEngineConfig) -> None:
        self._config = config
        self._client: AsyncMPClient | None = None
        self._reports = Pipe()
        self._grants = Pipe()
        self._ungranted: list[int] = []
        self._processes = EngineProcesses()

    async def start(self, segment: Segment, on_kv_reports: Callable[[Sequence[KvReport]], None]) -> EngineInfo:
        extra: dict[str, str | int] = {
            "segment_path": segment.path,
            "report_path": self._reports.writer_path,
            "grant_path": self._grants.reader_path,
            "layer_groups": self._config.layer_groups or (_CPU_LAYER_GROUPS if current_platform.is_cpu() else 1),
        }
        vllm_config = await asyncio.to_thread(_engine_config, self._config, extra)
        if current_platform.is_cpu() and vllm_config.model_config.enforce_eager:
            # Otherwise the first request for log probabilities compiles a kernel, and everybody waits 20 s.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        # Starting takes half a minute and blocks; signals are handled meanwhile.
        self._client = await asyncio.to_thread(_start_core, vllm_config)
        self._processes.note()
        layout = RankLayout.read(segment.header)
        segment.configure(layout.slot_bytes)
        reader = ReportReader(self._reports.read_fd)
        quorum = RankQuorum(layout.num_ranks)

        def on_readable() -> None:
            reports = [
                KvReport(KvReportKind(r.kind), r.ticket, r.block, r.slot, r.first_layer, r.num_layers)
                for r in reader.read()
                if quorum.complete(r)
            ]
            if reports:
                on_kv_reports(reports)

        asyncio.get_running_loop().add_reader(self._reports.read_fd, on_readable)
        return EngineInfo(
            name=f"vllm-{current_platform.device_type}",
            layout=_kv_layout(self._config, vllm_config, layout),
            max_model_len_tokens=vllm_config.model_config.max_model_len,
            vocab_size=vllm_config.model_config.get_vocab_size(),
            num_engine_blocks=layout.num_engine_blocks,
            max_running_requests=vllm_config.scheduler_config.max_num_seqs,
            max_batched_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        )

    async def submit(self, request: EngineRequest) -> None:
        params = sampling.to_vllm(request.sampling)
        params.extra_args = {**(params.extra_args or {}), "kv_transfer_params": asdict(request.kv)}
        if request.num_generated_tokens:
            params.extra_args[NUM_GENERATED_TOKENS] = request.num_generated_tokens
        await self._core.add_request_async(
            EngineCoreRequest(
                request_id=request.request_id,
                prompt_token_ids=list(request.prompt_token_ids),
                mm_features=None,
                sampling_params=params,
                pooling_params=None,
                arrival_time=time.time(),
                lora_request=None,
                cache_salt=request.cache_salt or None,
                data_parallel_rank=None,
                priority=request.priority,
            )
        )

    async def abort(self, request_ids: Sequence[str]) -> None:
        await self._core.abort_requests_async(list(request_ids))

    def grant(self, slots: Sequence[int]) -> None:
        self._ungranted.extend(slots)
        written = write_grants(self._grants.write_fd, self._ungranted)
        del self._ungranted[:written]

    async def steps(self) -> AsyncIterator[EngineStep]:
        while True:
            try:
                outputs = await self._core.get_output_async()
            except VllmEngineDeadError as error:
                raise EngineDeadError("vLLM's engine core has died; its log says why") from error
            yield _step(outputs)

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is None:
            return
        asyncio.get_running_loop().remove_reader(self._reports.read_fd)
        await asyncio.to_thread(client.shutdown, _SHUTDOWN_S)
        await asyncio.to_thread(self._processes.end)
        self._reports.close()
        self._grants.close()

    @property
    def _core(self) -> AsyncMPClient:
        if self._client is None:
            raise EngineDeadError("the engine is not running")
        return self._client


def parse_engine_args(config: VllmEngineConfig) -> AsyncEngineArgs:
    """vLLM's own parser over our defaults and the given options, which win. Raises `EngineOptionError`."""
    defaults = ["--model", config.model, "--served-model-name", config.served_model_name]
    if current_platform.is_cpu():
        # Compiling a graph takes minutes on a CPU; its attention kernels want multiples of 32. Prompts are computed in
        # chunks so that blocks of the first are on their way while the next is computed.
        defaults += ["--enforce-eager", "--block-size", "32", "--max-num-batched-tokens", "256"]
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(exit_on_error=False))
    try:
        args = parser.parse_args([*defaults, *config.options])
    except (SystemExit, argparse.ArgumentError, ValueError) as error:
        # The parser has printed what it does not like before it leaves with a number.
        reason = "see above" if isinstance(error, SystemExit) else error
        raise EngineOptionError(f"vLLM does not take the options {' '.join(config.options)}: {reason}") from error
    engine_args = AsyncEngineArgs.from_cli_args(args)
    if engine_args.worker_cls == "auto" and current_platform.is_cpu():
        engine_args.worker_cls = _CPU_WORKER
    elif engine_args.worker_cls == "auto" and current_platform.is_cuda_alike():
        engine_args.worker_cls = _GPU_WORKER
    if current_platform.is_cpu() and engine_args.tensor_parallel_size == 1:
        # A process for the only rank polls for a second after every step, on a core that others use as well.
        engine_args.distributed_executor_backend = engine_args.distributed_executor_backend or UniProcExecutor
    return engine_args


def _engine_config(config: VllmEngineConfig, extra: dict[str, str | int]) -> VllmConfig:
    args = parse_engine_args(config)
    if args.data_parallel_size != 1:
        raise EngineOptionError("--data-parallel-size is 1 for a worker; start more workers instead")
    for kind in _OTHER_PARALLELISM:
        if getattr(args, f"{kind}_parallel_size") != 1:
            option = f"--{kind.replace('_', '-')}-parallel-size"
            raise EngineOptionError(f"{option} is 1 for a worker: each rank holds its heads in all layers and blocks")
    args.kv_transfer_config = KVTransferConfig(
        kv_connector=vllm_connector.KvRelayConnector.__name__,
        kv_connector_module_path=vllm_connector.__name__,
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=extra,
    )
    return args.create_engine_config()


def _start_core(vllm_config: VllmConfig) -> AsyncMPClient:
    executor = Executor.get_class(vllm_config)
    threads: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if issubclass(executor, UniProcExecutor):
        # OpenMP reads when a process starts how many threads it has and on which cores; vLLM says so to ranks with
        # processes of their own only.
        threads = OMPProcessManager(vllm_config).configure_omp_envs(rank=0, local_rank=0)
    with threads:
        client = EngineCoreClient.make_async_mp_client(vllm_config=vllm_config, executor_class=executor, log_stats=True)
    assert isinstance(client, AsyncMPClient)
    return client


def _kv_layout(config: VllmEngineConfig, vllm_config: VllmConfig, rank: RankLayout) -> cluster_pb2.KvLayout:
    model = vllm_config.model_config
    layout = cluster_pb2.KvLayout(
        model=(
            f"{config.served_model_name}@{model_identity(model.model, model.hf_config)}"
            f":{model.quantization or 'none'}:{model.dtype}"
        ),
        dtype=rank.dtype,
        format=rank.format,
        num_layers=rank.num_layers,
        num_kv_heads=rank.num_kv_heads,
        head_elements=rank.head_elements,
        block_size_tokens=rank.block_size_tokens,
    )
    layout.fingerprint = layout_fingerprint(layout)
    return layout


def _step(outputs: EngineCoreOutputs) -> EngineStep:
    # Monotonic time is one clock for all processes of a machine.
    offset_ns = time.time_ns() - time.monotonic_ns()
    deltas = [_delta(output, outputs.timestamp, offset_ns) for output in outputs.outputs]
    step = EngineStep(deltas=deltas, ended_s=outputs.timestamp)
    stats = outputs.scheduler_stats
    if stats is not None:
        step.num_running_requests = stats.num_running_reqs
        step.num_waiting_requests = stats.num_waiting_reqs
        step.kv_usage = stats.kv_cache_usage
        step.has_load = True
    return step


def _delta(output: EngineCoreOutput, step_s: float, offset_ns: int) -> worker_pb2.TokenDelta:
    delta = worker_pb2.TokenDelta(
        request_id=output.request_id,
        token_ids=output.new_token_ids,
        finish_reason=_FINISH_REASONS[output.finish_reason],
    )
    if output.new_logprobs is not None:
        delta.logprobs.CopyFrom(logprobs.lists_to_proto(output.new_logprobs))
    if output.new_prompt_logprobs_tensors is not None:
        delta.prompt_logprobs.CopyFrom(logprobs.tensors_to_proto(output.new_prompt_logprobs_tensors))
    if isinstance(output.stop_reason, int):
        delta.stop_token_id = output.stop_reason
    events = [(_EVENTS[event.type], event.timestamp) for event in output.events or ()]
    if output.prefill_stats is not None:
        delta.num_cached_tokens = output.prefill_stats.num_cached_tokens
        events.append(("sampled", step_s))
    for name, seconds in events:
        delta.timeline.events.add(name=name, unix_ns=int(seconds * 1e9) + offset_ns)
    return delta
