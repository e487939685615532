"""A coordinator believes what it did at once, and of others what reports tell."""

from __future__ import annotations

from kvrelay.coordinator.scheduler.view import WorkerView
from kvrelay.simulator.load_account import LoadAccount
from kvrelay.simulator.worker import LoadReport
from kvrelay.v1 import cluster_pb2


def account() -> LoadAccount:
    view = WorkerView(
        worker_id="w",
        role=cluster_pb2.ROLE_BOTH,
        model="",
        address="w",
        fingerprint=b"",
        block_size_tokens=16,
        max_model_len_tokens=1000,
    )
    return LoadAccount(view, message_s=0.01)


def report(
    time_s: float, *, queued_tokens: int = 0, prefills: int = 0, decodes: int = 0, context_tokens: int = 0
) -> LoadReport:
    return LoadReport(
        time_s=time_s,
        num_queued_prompt_tokens=queued_tokens,
        num_prefill_jobs=prefills,
        num_decode_jobs=decodes,
        num_context_tokens=context_tokens,
    )


def test_own_requests_count_at_once() -> None:
    loads = account()
    loads.add_prompt(1, 100, now_s=0.0)
    loads.add_sequence(1, 120)
    view = loads.view
    assert (view.num_queued_prompt_tokens, view.num_queued_prompts) == (100, 1)
    assert (view.num_running_requests, view.num_context_tokens) == (1, 120)
    loads.end_prompt(1)
    loads.end_sequence(1)
    assert (view.num_queued_prompt_tokens, view.num_queued_prompts, view.num_running_requests) == (0, 0, 0)
    assert loads.num_own == 0


def test_what_a_report_cannot_know_yet_is_kept() -> None:
    loads = account()
    loads.add_prompt(1, 100, now_s=0.0)
    loads.take(report(0.005))
    assert loads.view.num_queued_prompt_tokens == 100


def test_what_is_computed_meanwhile_counts_no_more() -> None:
    loads = account()
    loads.add_prompt(1, 100, now_s=0.0)
    loads.take(report(0.5, queued_tokens=40, prefills=1))
    assert loads.view.num_queued_prompt_tokens == 40
    loads.add_prompt(2, 50, now_s=0.6)
    assert loads.view.num_queued_prompt_tokens == 90
    loads.end_prompt(1)
    assert loads.view.num_queued_prompt_tokens == 50


def test_what_others_sent_is_known_from_reports() -> None:
    loads = account()
    loads.add_prompt(1, 100, now_s=0.0)
    loads.add_sequence(1, 100)
    loads.send_sequence(1, now_s=0.1)
    loads.take(report(0.5, queued_tokens=300, prefills=3, decodes=5, context_tokens=900))
    view = loads.view
    assert (view.num_queued_prompt_tokens, view.num_queued_prompts) == (300, 3)
    assert (view.num_running_requests, view.num_context_tokens) == (5, 900)
    loads.take(report(0.7))
    assert (view.num_queued_prompts, view.num_running_requests) == (1, 1)
