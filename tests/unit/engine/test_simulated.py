"""The simulated engine keeps the contract of `Engine`: order of steps, reports, stops, aborts."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace

import pytest

from kvrelay.engine.base import EngineRequest, EngineStep, KvPlan, KvReport, KvReportKind
from kvrelay.engine.simulated import SimulatedEngine
from kvrelay.engine.simulated_model import KvContentError, SimulatedConfig, TokenChain, block_content, expected_tokens
from kvrelay.kv_transfer.segment import Segment
from kvrelay.v1 import common_pb2, worker_pb2

CONFIG = SimulatedConfig(block_size_tokens=4, num_engine_blocks=64, max_model_len_tokens=128, max_batched_tokens=16)
LOADED, SAVED, CLOSED = KvReportKind.LOADED, KvReportKind.SAVED, KvReportKind.CLOSED
LENGTH, STOP = common_pb2.FINISH_REASON_LENGTH, common_pb2.FINISH_REASON_STOP


def saved(ticket: int, block: int, slot: int) -> KvReport:
    """A whole block."""
    return KvReport(SAVED, ticket, block, slot, 0, CONFIG.num_layers)


class Rig:
    """An engine under a fake clock, and everything it reported."""

    def __init__(self, config: SimulatedConfig, segment: Segment) -> None:
        self.now = 0.0
        self.config = config
        self.segment = segment
        self.engine = SimulatedEngine(config, clock=lambda: self.now, sleep=self._sleep)
        self.reports: list[KvReport] = []
        self.deltas: list[worker_pb2.TokenDelta] = []
        self.steps: list[EngineStep] = []
        self.num_tickets = 0

    async def _sleep(self, seconds: float) -> None:
        self.now += seconds

    async def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        *,
        load: Sequence[int] = (),
        save: Sequence[int] = (),
        partial_tokens: int = 0,
        **sampling: object,
    ) -> int:
        self.num_tickets += 1
        params = common_pb2.SamplingParams(**sampling)  # type: ignore[arg-type]
        load_tokens = min(len(load) * self.config.block_size_tokens, len(prompt) - 1)
        plan = KvPlan(
            ticket=self.num_tickets,
            load=load,
            load_tokens=load_tokens,
            first_save=len(load),
            save=save,
            partial_tokens=partial_tokens,
        )
        await self.engine.submit(
            EngineRequest(request_id=request_id, prompt_token_ids=prompt, sampling=params, kv=plan)
        )
        return self.num_tickets

    async def run(self, num_steps: int | None = None) -> None:
        """Take steps; until every ticket is closed by default."""
        async with aclosing(self.engine.steps()) as steps:  # type: ignore[type-var]
            async for step in steps:
                self.steps.append(step)
                self.deltas.extend(step.deltas)
                if len(self.of(CLOSED)) == self.num_tickets or len(self.steps) == num_steps:
                    return

    def of(self, kind: KvReportKind) -> list[KvReport]:
        return [report for report in self.reports if report.kind is kind]

    def tokens(self, request_id: str) -> list[int]:
        return [token for delta in self.deltas if delta.request_id == request_id for token in delta.token_ids]

    def content(self, slot: int) -> bytes:
        return bytes(self.segment.slot_view(slot))


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment.create(1 << 20)
    yield segment
    segment.close()


async def make_rig(segment: Segment, config: SimulatedConfig = CONFIG) -> Rig:
    rig = Rig(config, segment)
    info = await rig.engine.start(segment, rig.reports.extend)
    assert segment.slot_bytes == config.block_bytes
    assert info.layout.fingerprint
    return rig


@pytest.fixture
async def rig(segment: Segment) -> AsyncIterator[Rig]:
    rig = await make_rig(segment)
    yield rig
    await rig.engine.close()


async def test_tokens_are_the_expected_ones(rig: Rig) -> None:
    await rig.submit("a", range(5), max_tokens=6)
    await rig.run()
    assert rig.tokens("a") == expected_tokens(range(5), 6, CONFIG)
    assert [delta.finish_reason for delta in rig.deltas] == [0] * 5 + [LENGTH]
    assert rig.deltas[0].num_cached_tokens == 0


async def test_a_long_prompt_is_computed_in_chunks_and_each_block_saved_when_done(rig: Rig) -> None:
    ticket = await rig.submit("a", range(38), save=range(10, 19), max_tokens=1)
    await rig.run(num_steps=1)
    assert rig.reports == [saved(ticket, block, 10 + block) for block in range(4)]
    await rig.run(num_steps=2)
    assert len(rig.reports) == 8
    await rig.run()
    assert rig.reports[8:] == [saved(ticket, 8, 18), KvReport(CLOSED, ticket)]
    assert [len(step.deltas) for step in rig.steps] == [0, 0, 1]


async def test_blocks_of_a_prompt_are_saved_by_groups_of_layers_while_the_step_lasts(segment: Segment) -> None:
    config = replace(CONFIG, num_layers=5, layer_groups=2)
    rig = Rig(config, segment)
    told: list[tuple[float, int, int, int, int]] = []

    def on_reports(reports: Sequence[KvReport]) -> None:
        rig.reports.extend(reports)
        told.extend((rig.now, r.block, r.slot, r.first_layer, r.num_layers) for r in reports if r.kind is SAVED)

    await rig.engine.start(segment, on_reports)
    rig.engine.grant([20])
    await rig.submit("a", range(7), save=[0, 1], partial_tokens=7, max_tokens=6)
    await rig.run()
    step_s = config.step_s(7, 1, any_decode=False)
    assert told[:2] == [(step_s / 2, block, block, 0, 2) for block in range(2)]
    assert told[2:4] == [(step_s, block, block, 2, 3) for block in range(2)]
    assert told[4][1:] == (2, 20, 0, 5), "a generated block is saved whole"
    digests = TokenChain(config, range(7))
    assert rig.content(0) == block_content(config, digests.block_digests[0], 0)
    assert rig.content(1) == block_content(config, digests.digest(), 1)


async def test_an_abort_between_two_groups_leaves_the_rest_of_the_block_alone(segment: Segment) -> None:
    config = replace(CONFIG, layer_groups=2)
    rig = Rig(config, segment)
    num_sleeps = 0

    async def abort_in_the_second_group(_seconds: float) -> None:
        nonlocal num_sleeps
        num_sleeps += 1
        if num_sleeps == 2:
            await rig.engine.abort(["a"])

    rig.engine = SimulatedEngine(config, clock=lambda: 0.0, sleep=abort_in_the_second_group)
    await rig.engine.start(segment, rig.reports.extend)
    ticket = await rig.submit("a", range(4), save=[0], max_tokens=5)
    await rig.run()
    assert rig.reports == [KvReport(SAVED, ticket, 0, 0, 0, 2), KvReport(CLOSED, ticket)]
    half = config.block_bytes // 2
    assert any(rig.content(0)[:half])
    assert not any(rig.content(0)[half:])


@pytest.mark.parametrize("groups", [0, 5])
def test_there_is_no_group_without_a_layer(groups: int) -> None:
    with pytest.raises(ValueError, match=r"use 1\.\.4"):
        SimulatedConfig(layer_groups=groups)


async def test_saved_blocks_hold_what_their_tokens_say(rig: Rig) -> None:
    await rig.submit("a", range(8), save=[3, 1], max_tokens=1)
    await rig.run()
    digests = TokenChain(CONFIG, range(8)).block_digests
    assert [rig.content(3), rig.content(1)] == [block_content(CONFIG, digests[i], i) for i in range(2)]


async def test_loaded_blocks_are_not_computed_and_the_answer_is_the_same(rig: Rig) -> None:
    await rig.submit("p", range(10), save=[0, 1], max_tokens=1)
    await rig.run()
    before = rig.now
    ticket = await rig.submit("d", [*range(10), *rig.tokens("p")], load=[0, 1], max_tokens=4)
    await rig.run()
    assert rig.tokens("p") + rig.tokens("d") == expected_tokens(range(10), 5, CONFIG)
    assert rig.of(LOADED) == [KvReport(LOADED, ticket, block=2)]
    assert next(delta for delta in rig.deltas if delta.request_id == "d").num_cached_tokens == 8
    one_prefill = CONFIG.step_s(3, 1, any_decode=False)
    assert rig.now - before == pytest.approx(one_prefill + 3 * CONFIG.step_s(0, 1, any_decode=True))


async def test_a_prompt_that_is_stored_whole_still_computes_its_last_token(rig: Rig) -> None:
    await rig.submit("p", range(8), save=[0, 1], max_tokens=1)
    await rig.run()
    await rig.submit("d", range(8), load=[0, 1], max_tokens=1)
    await rig.run()
    assert rig.deltas[-1].num_cached_tokens == 7
    assert rig.tokens("d") == rig.tokens("p")


async def test_a_block_that_is_not_full_is_handed_over_too(rig: Rig) -> None:
    ticket = await rig.submit("p", range(10), save=[0, 1, 2], partial_tokens=10, max_tokens=1)
    await rig.run()
    assert rig.of(SAVED) == [saved(ticket, block, block) for block in range(3)]
    await rig.submit("exact", [*range(10), *rig.tokens("p")], load=[0, 1, 2], max_tokens=4)
    await rig.submit("again", range(10), load=[0, 1, 2], max_tokens=1)
    await rig.run()
    assert rig.tokens("p") + rig.tokens("exact") == expected_tokens(range(10), 5, CONFIG)
    assert rig.tokens("again") == rig.tokens("p")
    assert {delta.num_cached_tokens for delta in rig.deltas if delta.HasField("num_cached_tokens")} == {0, 10, 9}


async def test_a_block_that_is_not_full_must_hold_the_right_tokens(rig: Rig) -> None:
    await rig.submit("p", range(10), save=[0, 1, 2], partial_tokens=10, max_tokens=1)
    await rig.run()
    await rig.submit("d", [*range(9), 77, 78], load=[0, 1, 2], max_tokens=1)
    with pytest.raises(KvContentError, match="slot 2 does not hold KV block 2"):
        await rig.run()


async def test_a_wrong_block_kills_the_engine_loudly(rig: Rig) -> None:
    await rig.submit("p", range(10), save=[0, 1], max_tokens=1)
    await rig.run()
    await rig.submit("d", range(10), load=[1, 0], max_tokens=1)
    with pytest.raises(KvContentError, match="slot 1 does not hold KV block 0"):
        await rig.run()


async def test_generated_blocks_go_to_granted_slots_until_these_run_out(rig: Rig) -> None:
    rig.engine.grant([20, 21])
    ticket = await rig.submit("a", range(6), save=[0], max_tokens=12)
    await rig.run()
    assert rig.of(SAVED) == [saved(ticket, block, slot) for block, slot in enumerate([0, 20, 21])]
    digests = TokenChain(CONFIG, [*range(6), *rig.tokens("a")]).block_digests
    assert rig.content(21) == block_content(CONFIG, digests[2], 2)


async def test_no_block_is_saved_after_a_gap(rig: Rig) -> None:
    await rig.submit("a", range(4), max_tokens=20)
    await rig.run(num_steps=2)
    rig.engine.grant([20])
    await rig.run()
    assert rig.of(SAVED) == []


async def test_decodes_and_prefill_chunks_share_a_step(rig: Rig) -> None:
    await rig.submit("short", range(3), max_tokens=3)
    await rig.submit("long", range(40), max_tokens=1)
    await rig.run()
    assert [[delta.request_id for delta in step.deltas] for step in rig.steps] == [
        ["short"],
        ["short"],
        ["short", "long"],
    ]
    assert (rig.steps[0].num_running_requests, rig.steps[-1].num_running_requests) == (2, 0)
    assert rig.steps[-1].kv_usage == 0


async def test_eos_stops_unless_ignored(segment: Segment) -> None:
    rig = await make_rig(segment, SimulatedConfig(eos_rate=1.0))
    await rig.submit("a", [1], max_tokens=5)
    await rig.submit("b", [1], max_tokens=5, ignore_eos=True)
    await rig.run()
    assert (rig.tokens("a"), rig.tokens("b")) == ([2], [2] * 5)
    assert rig.deltas[0].finish_reason == STOP
    assert not rig.deltas[0].HasField("stop_token_id")


async def test_a_stop_token_ends_the_request_and_is_named(rig: Rig) -> None:
    expected = expected_tokens([1, 2], 5, CONFIG)
    await rig.submit("a", [1, 2], max_tokens=5, stop_token_ids=[expected[2]])
    await rig.run()
    assert rig.tokens("a") == expected[:3]
    assert (rig.deltas[-1].finish_reason, rig.deltas[-1].stop_token_id) == (STOP, expected[2])


async def test_min_tokens_keeps_stop_tokens_away(segment: Segment) -> None:
    rig = await make_rig(segment, SimulatedConfig(eos_rate=0.9))
    await rig.submit("a", [1], max_tokens=20, min_tokens=6)
    await rig.run()
    assert 2 not in rig.tokens("a")[:6]
    assert rig.tokens("a")[-1] == 2


async def test_a_full_context_ends_the_request(rig: Rig) -> None:
    await rig.submit("a", range(120))
    await rig.run()
    assert len(rig.tokens("a")) == 8
    assert rig.deltas[-1].finish_reason == LENGTH


async def test_a_seed_changes_the_tokens_but_not_the_blocks(rig: Rig) -> None:
    await rig.submit("a", range(8), save=[0, 1], max_tokens=4)
    await rig.submit("b", range(8), save=[2, 3], max_tokens=4, seed=11)
    await rig.run()
    assert rig.tokens("b") == expected_tokens(range(8), 4, CONFIG, seed=11) != rig.tokens("a")
    assert rig.content(0) == rig.content(2)


async def test_log_probabilities_have_one_row_a_token(rig: Rig) -> None:
    await rig.submit("a", [7, 8, 9], max_tokens=2, logprobs=3, prompt_logprobs=0)
    await rig.run()
    first, second = rig.deltas
    assert (first.logprobs.width, len(first.logprobs.token_ids), list(first.logprobs.sampled_ranks)) == (4, 4, [1])
    assert list(first.logprobs.token_ids[:2]) == [first.token_ids[0]] * 2
    assert list(first.prompt_logprobs.token_ids) == [8, 9]
    assert not second.HasField("prompt_logprobs")


async def test_aborted_requests_are_closed_once_and_write_nothing_more(rig: Rig) -> None:
    running = await rig.submit("a", range(40), save=range(10), max_tokens=50)
    waiting = await rig.submit("b", range(5), max_tokens=5)
    await rig.run(num_steps=1)
    await rig.engine.abort(["a", "b", "unknown"])
    await rig.engine.abort(["a"])
    await rig.run()
    assert sorted(report.ticket for report in rig.of(CLOSED)) == [running, waiting]
    assert rig.deltas == []
    assert rig.steps[-1].kv_usage == 0
    assert rig.content(5) == bytes(CONFIG.block_bytes)


async def test_an_abort_in_the_middle_of_a_step_leaves_its_slots_alone(segment: Segment) -> None:
    rig = Rig(CONFIG, segment)

    async def abort_while_computing(_seconds: float) -> None:
        await rig.engine.abort(["a"])

    rig.engine = SimulatedEngine(CONFIG, clock=lambda: 0.0, sleep=abort_while_computing)
    await rig.engine.start(segment, rig.reports.extend)
    ticket = await rig.submit("a", range(8), save=[0, 1], max_tokens=5)
    await rig.run()
    assert rig.reports == [KvReport(CLOSED, ticket)]
    assert rig.content(0) == bytes(CONFIG.block_bytes)


async def test_an_id_can_be_used_again_once_it_is_over(rig: Rig) -> None:
    await rig.submit("a", [1], max_tokens=1)
    with pytest.raises(ValueError, match="already in the engine"):
        await rig.submit("a", [1], max_tokens=1)
    rig.num_tickets -= 1
    await rig.run()
    await rig.submit("a", [1], max_tokens=1)


async def test_preempted_requests_come_back_and_say_the_same(segment: Segment) -> None:
    config = SimulatedConfig(
        block_size_tokens=4, num_engine_blocks=8, max_model_len_tokens=32, max_batched_tokens=16, decode_step_s=1.0
    )
    rig = await make_rig(segment, config)
    for i in range(3):
        await rig.submit(f"r{i}", range(i, i + 10), save=[2 * i, 2 * i + 1], max_tokens=14)
    await rig.run()
    for i in range(3):
        assert rig.tokens(f"r{i}") == expected_tokens(range(i, i + 10), 14, config)
    assert len(rig.of(SAVED)) == 6
    assert any(step.num_waiting_requests for step in rig.steps[3:])


async def test_lower_priority_values_are_served_first(segment: Segment) -> None:
    rig = await make_rig(segment, SimulatedConfig(max_num_seqs=1))
    for name, priority in (("late", 5), ("early", -1)):
        rig.num_tickets += 1
        await rig.engine.submit(
            EngineRequest(
                request_id=name,
                prompt_token_ids=[1],
                sampling=common_pb2.SamplingParams(max_tokens=1),
                kv=KvPlan(ticket=rig.num_tickets),
                priority=priority,
            )
        )
    await rig.run()
    assert [delta.request_id for delta in rig.deltas] == ["early", "late"]


async def test_closing_ends_the_steps_and_closes_every_ticket(rig: Rig) -> None:
    ticket = await rig.submit("a", range(40), max_tokens=5)
    await rig.run(num_steps=1)
    await rig.engine.close()
    await rig.engine.close()
    assert rig.of(CLOSED) == [KvReport(CLOSED, ticket)]
    assert [step async for step in rig.engine.steps()] == []


async def test_prompts_that_cannot_fit_are_refused(rig: Rig) -> None:
    with pytest.raises(ValueError, match="leaves no room in a context of 128 tokens"):
        await rig.engine.submit(
            EngineRequest(
                request_id="a", prompt_token_ids=range(128), sampling=common_pb2.SamplingParams(), kv=KvPlan(ticket=1)
            )
        )
