"""An engine without a model: deterministic tokens, recognisable KV blocks, the timing it is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from kvrelay.engine.base import Engine, EngineInfo, EngineRequest, EngineStep, KvReport, KvReportKind
from kvrelay.engine.simulated_batch import Batch, SequenceState, Work
from kvrelay.engine.simulated_model import SimulatedConfig, TokenChain, check_block, next_token
from kvrelay.engine.simulated_output import Sampled, to_delta
from kvrelay.engine.simulated_saver import Saver
from kvrelay.kv_transfer.segment import Segment
from kvrelay.v1 import common_pb2


class SimulatedEngine(Engine):
    """Behaves like vLLM towards a worker: chunked prefill, continuous batching, preemption, one delta a token.

    Honours max_tokens, min_tokens, stop tokens, ignore_eos, seed, logprobs and prompt_logprobs; other sampling
    parameters change nothing. Loaded blocks are compared with what their tokens would have computed:
    `steps` raises `KvContentError` where they differ. The engine runs while somebody iterates over `steps`.
    """

    def __init__(
        self,
        config: SimulatedConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._config = config
        self._clock = clock
        self._sleep = sleep
        self._batch = Batch(config)
        self._by_id: dict[str, SequenceState] = {}
        self._reports: list[KvReport] = []
        self._wake = asyncio.Event()
        self._closed = False
        self._segment: Segment | None = None
        self._saver: Saver | None = None
        self._on_kv_reports: Callable[[Sequence[KvReport]], None] = _ignore

    async def start(self, segment: Segment, on_kv_reports: Callable[[Sequence[KvReport]], None]) -> EngineInfo:
        config = self._config
        segment.configure(config.block_bytes)
        self._segment = segment
        self._saver = Saver(config, segment)
        self._on_kv_reports = on_kv_reports
        return EngineInfo(
            name="simulated",
            layout=config.layout(),
            max_model_len_tokens=config.max_model_len_tokens,
            vocab_size=config.vocab_size,
            num_engine_blocks=config.num_engine_blocks,
            max_running_requests=config.max_num_seqs,
            max_batched_tokens=config.max_batched_tokens,
        )

    async def submit(self, request: EngineRequest) -> None:
        if request.request_id in self._by_id:
            raise ValueError(f"request {request.request_id!r} is already in the engine")
        if not 1 <= len(request.prompt_token_ids) < self._config.max_model_len_tokens:
            raise ValueError(
                f"a prompt of {len(request.prompt_token_ids)} tokens leaves no room in a context of"
                f" {self._config.max_model_len_tokens} tokens"
            )
        self._by_id[request.request_id] = self._batch.add(request)
        self._wake.set()

    async def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if sequence := self._by_id.get(request_id):
                self._end(sequence)
        self._wake.set()

    def grant(self, slots: Sequence[int]) -> None:
        assert self._saver is not None
        self._saver.grant(slots)

    async def steps(self) -> AsyncIterator[EngineStep]:
        while not self._closed:
            work = self._batch.schedule()
            if work or self._reports:
                yield await self._step(work)
            else:
                self._wake.clear()
                await self._wake.wait()

    async def close(self) -> None:
        self._closed = True
        self._wake.set()
        for sequence in list(self._batch):
            self._end(sequence)
        self._report()

    async def _step(self, work: list[Work]) -> EngineStep:
        assert self._saver is not None
        starts_at, duration_s = self._clock(), self._duration_s(work)
        for item in work:
            if item.load:
                self._load(item.sequence)
        due = self._saver.due(work)
        for group in range(self._config.layer_groups):
            self._report()
            ends_at = starts_at + duration_s * (group + 1) / self._config.layer_groups
            await self._sleep(max(0.0, ends_at - self._clock()))
            self._reports += self._saver.save_layers(due, group)
        step = EngineStep()
        for item in work:
            sequence = item.sequence
            if sequence.over:  # aborted meanwhile: its slots belong to somebody else
                continue
            sequence.num_computed_tokens += item.num_tokens
            self._reports += self._saver.save_generated(sequence)
            if sequence.num_computed_tokens == sequence.num_tokens:
                sampled = self._sample(sequence)
                step.deltas.append(to_delta(self._config, sequence, sampled))
                if sampled.finish_reason:
                    self._end(sequence)
        self._report()
        step.ended_s = self._clock()
        step.has_load = True
        step.num_running_requests = self._batch.num_running
        step.num_waiting_requests = self._batch.num_waiting
        step.kv_usage = self._batch.kv_usage
        return step

    def _duration_s(self, work: list[Work]) -> float:
        prefill = [item for item in work if not item.sequence.output_token_ids]
        num_tokens = sum(item.num_tokens for item in prefill)
        return self._config.step_s(num_tokens, len(work), any_decode=len(prefill) < len(work))

    def _load(self, sequence: SequenceState) -> None:
        assert self._segment is not None
        digests = sequence.chain.block_digests
        last = [TokenChain(self._config, sequence.request.prompt_token_ids[:-1]).digest(), sequence.chain.digest()]
        for block, slot in enumerate(sequence.request.kv.load):
            # A block that the prompt does not fill was stored under the tokens it had.
            valid = digests[block : block + 1] + (last if block >= len(digests) - 1 else [])
            check_block(self._config, valid, block, slot, bytes(self._segment.slot_view(slot)))
        self._reports.append(KvReport(KvReportKind.LOADED, sequence.request.kv.ticket, len(sequence.request.kv.load)))

    def _sample(self, sequence: SequenceState) -> Sampled:
        sampling = sequence.request.sampling
        output = sequence.output_token_ids
        eos = sampling.eos_token_id if sampling.HasField("eos_token_id") else self._config.eos_token_id
        stops = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {eos})
        never = stops | set(sampling.all_stop_token_ids) if len(output) < sampling.min_tokens else ()
        digest = sequence.chain.digest()
        token = next_token(self._config, digest, sampling.seed if sampling.HasField("seed") else None, never)
        output.append(token)
        sequence.chain.append([token])
        sequence.num_tokens += 1
        full = sequence.num_tokens >= self._config.max_model_len_tokens
        if token in stops:
            reason = common_pb2.FINISH_REASON_STOP
        elif full or (sampling.HasField("max_tokens") and len(output) >= sampling.max_tokens):
            reason = common_pb2.FINISH_REASON_LENGTH
        else:
            reason = common_pb2.FINISH_REASON_UNSPECIFIED
        is_stop_token = token in stops and (sampling.ignore_eos or token != eos)
        return Sampled(token, digest, reason, token if is_stop_token else None)

    def _end(self, sequence: SequenceState) -> None:
        self._batch.remove(sequence)
        del self._by_id[sequence.request.request_id]
        self._reports.append(KvReport(KvReportKind.CLOSED, sequence.request.kv.ticket))

    def _report(self) -> None:
        if self._reports:
            reports, self._reports = self._reports, []
            self._on_kv_reports(reports)


def _ignore(_reports: Sequence[KvReport]) -> None:
    """Stands in until `start`."""
