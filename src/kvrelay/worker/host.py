"""What runs in a worker whatever its role: one engine, one host block store, and the loops between them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from kvrelay.block_hash import BlockHasher
from kvrelay.engine.base import Engine, EngineInfo, EngineRequest, EngineStep, KvPlan, KvReport, KvReportKind
from kvrelay.kv_transfer.block_part import BlockPart
from kvrelay.kv_transfer.block_store import BlockStore
from kvrelay.kv_transfer.borrowing import Borrower, PrefixSource
from kvrelay.kv_transfer.collectives import Collectives
from kvrelay.kv_transfer.disk_tier import DiskTier
from kvrelay.kv_transfer.frame_decoder import FrameDecoder
from kvrelay.kv_transfer.held_blocks import HeldBlocks
from kvrelay.kv_transfer.lending import Lender
from kvrelay.kv_transfer.link_coder import accepted
from kvrelay.kv_transfer.peer import Peers
from kvrelay.kv_transfer.posting import post_to_running_loop
from kvrelay.kv_transfer.receiver import Receiver
from kvrelay.kv_transfer.segment import Segment
from kvrelay.tracing import Tracing
from kvrelay.v1 import common_pb2, kv_transfer_pb2, worker_pb2
from kvrelay.worker.engine_calls import EngineCalls
from kvrelay.worker.engine_span import trace_engine
from kvrelay.worker.engine_watch import DEFAULT_WATCH, EngineWatch, WatchConfig
from kvrelay.worker.link_speeds import LinkSpeeds
from kvrelay.worker.request_checks import check_request
from kvrelay.worker.step_timer import StepTimer
from kvrelay.worker.store_config import StoreConfig
from kvrelay.worker.stored_prompt import StoredPrompt, look_up, name_blocks
from kvrelay.worker.submission import Handlers, PromptSlots, Submission
from kvrelay.worker.work import Work

_EXPIRE_INTERVAL_S = 1.0
_IDLE_POLL_S = 0.02


class WorkerHost:
    """Owns the engine, the store and everything that is in flight between them. Made by `running_host`."""

    lender: Lender

    def __init__(
        self,
        engine: Engine,
        info: EngineInfo,
        segment: Segment,
        config: StoreConfig,
        tracing: Tracing,
        on_broken: Callable[[Exception], object],
        watch: WatchConfig = DEFAULT_WATCH,
    ) -> None:
        """`on_broken` is told when the accounts of slots do not fit what happens to them: this must not go on."""
        self.info = info
        self.segment = segment
        self.transport = config.transport
        self.counters: Counter[str] = Counter()
        self.collectives = Collectives(config=config.collective)
        self.peers = Peers(info.layout, config.compression, collectives=self.collectives, counters=self.counters)
        self.tracing = tracing
        self.store = BlockStore(segment.num_slots, on_taken=segment.begin_generation)
        self.receiver = Receiver(
            self.store,
            segment,
            FrameDecoder(info.layout, accepted(config.compression, info.layout)),
            hold_s=config.transfer_hold_s,
            post=post_to_running_loop(on_broken),
        )
        self.local_segment: kv_transfer_pb2.LocalSegment | None = None
        if config.transport.shares_memory:
            self.local_segment = kv_transfer_pb2.LocalSegment(path=segment.path, proof=segment.proof)
        self.disk: DiskTier | None = None
        self.borrower = Borrower(self.store, self.receiver, self.peers, info.layout)
        self.block_size = info.layout.block_size_tokens
        self._engine = engine
        self._calls = EngineCalls(engine)
        self._tickets = itertools.count(1)
        self._by_ticket: dict[int, Submission] = {}
        self._by_engine_id: dict[str, Submission] = {}
        self.watch = EngineWatch(self._calls, self._tickets, lambda: bool(self._by_engine_id), watch)
        self.load = EngineStep()
        """The engine's gauges of its latest step."""
        self._max_granted = min(config.max_granted_blocks, segment.num_slots // 8)
        self._num_granted = 0
        self.num_queued_prompts = 0
        """In the engine, without a first token."""
        self.num_queued_tokens = 0
        """Of prompts without a first token, what was not stored."""
        self.num_context_tokens = 0
        """Of all sequences in the engine."""
        self.timer = StepTimer(info.layout.block_size_tokens)
        self.link_speeds = LinkSpeeds()
        self.jobs: Counter[str] = Counter()
        """Requests that a role works on, by its name."""

    async def look_up(
        self, cache_salt: str, prompt_token_ids: Sequence[int], source: PrefixSource | None = None
    ) -> tuple[BlockHasher, StoredPrompt]:
        """The hashes of a prompt and what the store has of it, pinned once.

        Blocks on disk are brought back before, and then what only the source has is fetched.

        Cancellation leaves nothing pinned.
        """
        hasher = BlockHasher(self.info.layout, cache_salt, prompt_token_ids[:-1])
        names = name_blocks(hasher, prompt_token_ids[-1])
        on_disk = self.disk.restored(names.hashes, names.or_last) if self.disk else contextlib.nullcontext(())
        async with on_disk as restored, self.borrower.borrowed(source, names.hashes) as num_fetched:
            self.counters["blocks_fetched"] += num_fetched
            stored = look_up(self.store, names, restored)
            self.store.pin(stored.load)
        return hasher, stored

    @property
    def held_blocks(self) -> HeldBlocks:
        """What a request would find here."""
        return HeldBlocks(self.store, self.disk.index if self.disk else None)

    @property
    def num_requests(self) -> int:
        """In the engine."""
        return len(self._by_engine_id)

    @property
    def num_computed_tokens(self) -> int:
        """Of `num_queued_tokens`, what the engine has computed and saved meanwhile."""
        return sum(each.num_computed_tokens for each in self._by_engine_id.values() if not each.has_first_token)

    def validate(self, prompt_token_ids: Sequence[int], params: common_pb2.SamplingParams) -> None:
        """Refuse what could harm the engine. Raises `InvalidRequestError`."""
        check_request(self.info, prompt_token_ids, params)

    async def submit(
        self,
        work: Work,
        hasher: BlockHasher,
        stored: StoredPrompt,
        *,
        save_partial: bool,
        handlers: Handlers,
    ) -> Submission:
        """Hand a request to the engine. `stored.load` is pinned, and these pins pass over.

        With `save_partial` the prompt's last block is stored although it is not full.
        """
        num_full = hasher.num_tokens // self.block_size
        names = stored.hashes if save_partial else stored.hashes[:num_full]
        first_save = min(len(stored.present), len(names))
        save = self.store.reserve(len(names) - first_save)
        saving = {first_save + i: slot for i, slot in enumerate(save)}
        plan = KvPlan(
            ticket=next(self._tickets),
            load=stored.load,
            load_tokens=stored.load_tokens,
            first_save=first_save,
            save=save,
            partial_tokens=hasher.num_tokens if num_full in saving else 0,
        )
        num_layers = self.info.layout.num_layers
        slots = PromptSlots(
            num_layers=num_layers, load=stored.load, load_tokens=stored.load_tokens, saving=saving, names=names
        )
        submission = Submission(plan.ticket, work, self.store, hasher, slots, handlers)
        self._by_ticket[submission.ticket] = submission
        self._by_engine_id[submission.engine_request_id] = submission
        self.num_queued_prompts += 1
        self.num_queued_tokens += submission.num_queued_tokens
        self.num_context_tokens += submission.num_tokens
        self.counters["requests"] += 1
        request = EngineRequest(
            request_id=submission.engine_request_id,
            prompt_token_ids=work.prompt_token_ids,
            sampling=work.sampling,
            kv=plan,
            cache_salt=work.cache_salt,
            priority=work.priority,
            num_generated_tokens=work.num_generated_tokens,
        )
        try:
            await self._calls.submit(request, lambda: self._drop(submission))
        except asyncio.CancelledError:
            self.abort(submission)
            raise
        return submission

    def _drop(self, submission: Submission) -> None:
        """The engine does not take the request."""
        self._forget(submission)
        submission.end()
        self._close(submission)

    @contextlib.contextmanager
    def job(self, role: Literal["prefill", "decode"]) -> Iterator[None]:
        """Around everything that a role does for one request."""
        self.jobs[role] += 1
        try:
            yield
        finally:
            self.jobs[role] -= 1

    async def wait_idle(self) -> None:
        """Until no role works on a request, and no blocks are held or coming for one that is still elsewhere."""
        while self.jobs.total() or self.receiver.num_transfers:  # noqa: ASYNC110 - once in a worker's life
            await asyncio.sleep(_IDLE_POLL_S)

    def abort(self, submission: Submission) -> None:
        """End a request early; its slots come back as soon as the engine lets go of them."""
        if submission.ended.is_set():
            return
        self._forget(submission)
        submission.end()
        self._calls.abort(submission.engine_request_id)

    def _forget(self, submission: Submission) -> None:
        if self._by_engine_id.pop(submission.engine_request_id, None):
            self.num_context_tokens -= submission.num_tokens
            if not submission.has_first_token:
                self._end_prompt(submission)

    def _end_prompt(self, submission: Submission) -> None:
        self.num_queued_prompts -= 1
        self.num_queued_tokens -= submission.num_queued_tokens

    async def run_calls(self) -> None:
        """Pass requests and aborts on to the engine."""
        await self._calls.run()

    async def run(self) -> None:
        """Deliver the engine's steps until it dies; raises `EngineDeadError` then."""
        async for step in self._engine.steps():
            if step.has_load:
                self.load = step
            for delta in step.deltas:
                submission = self._by_engine_id.get(delta.request_id)
                if submission is None:  # Aborted meanwhile, or nobody's.
                    self.watch.take(delta)
                    continue
                if delta.token_ids:
                    self._note_tokens(submission, delta)
                submission.add_delta(delta)
                if submission.ended.is_set():
                    self.timer.saw_finish()
                    self._forget(submission)
                    trace_engine(self.tracing, submission.work)
            self.timer.end_step(step)
            self.watch.saw_step(has_tokens=any(delta.token_ids for delta in step.deltas))

    def _note_tokens(self, submission: Submission, delta: worker_pb2.TokenDelta) -> None:
        """Follow what is queued and what the engine has, before the submission takes the tokens."""
        if submission.has_first_token:
            self.timer.saw_token(submission.num_tokens)
        else:
            self._end_prompt(submission)
            self.timer.saw_first_token(submission.num_tokens, delta.num_cached_tokens, submission.submitted_s)
        self.num_context_tokens += len(delta.token_ids)
        self.counters["tokens"] += len(delta.token_ids)

    def on_kv_reports(self, reports: Sequence[KvReport]) -> None:
        """Follow what the engine does with slots."""
        for report in reports:
            saved = [report.slot] if report.kind is KvReportKind.SAVED else []
            self._num_granted -= sum(map(self.store.is_granted, saved))
            if self.watch.takes(report):
                self.store.release(saved)
                continue
            submission = self._by_ticket[report.ticket]
            if saved:
                part = BlockPart(report.block, report.slot, report.first_layer, report.num_layers)
                self.counters["blocks_saved"] += submission.saved(part)
            elif report.kind is KvReportKind.LOADED:
                self.counters["blocks_loaded"] += report.block
                submission.loaded(report.block)
            else:
                self._close(submission)
        self.top_up_grants()

    def _close(self, submission: Submission) -> None:
        submission.close()
        del self._by_ticket[submission.ticket]

    def top_up_grants(self) -> None:
        """Lend the engine slots up to the limit."""
        slots = self.store.grant(self._max_granted - self._num_granted)
        self._num_granted += len(slots)
        if slots:
            self._engine.grant(slots)

    async def expire(self) -> None:
        """Let go of transfers that nobody asks for, and of peers that nobody sends to."""
        while True:
            await asyncio.sleep(_EXPIRE_INTERVAL_S)
            self.counters["transfers_expired"] += self.receiver.expire()
            await self.peers.expire()
