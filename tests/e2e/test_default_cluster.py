"""What `make up` starts: it answers, is traced, survives the loss of a child, and ends as a whole."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys

import httpx
import openai
import psutil
import pytest

from kvrelay.client import Client
from kvrelay.launch import devices
from kvrelay.launch.state import default_state_dir
from tests.support.live_cluster import LiveCluster
from tests.support.otlp_receiver import OtlpReceiver, assert_one_tree

pytestmark = pytest.mark.timeout(600)

QUESTION = [{"role": "user", "content": "Name the capital of France."}]
MODEL = "SmolLM2-135M-Instruct"
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


def client_of(cluster: LiveCluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.state.http_url}/v1", api_key="none", max_retries=0)


def test_knows_the_capital_of_france(default_cluster: LiveCluster) -> None:
    with client_of(default_cluster) as client:
        whole = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=30, temperature=0)
        stream = client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            max_tokens=30,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)

    assert "Paris" in (whole.choices[0].message.content or "")
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_the_printed_curl_line_works(default_cluster: LiveCluster) -> None:
    line = next(line for line in default_cluster.output.read_text().splitlines() if line.startswith("curl "))

    answer = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)

    assert "Paris" in answer.stdout


def test_one_chat_is_one_trace_across_three_processes(default_cluster: LiveCluster, otlp: OtlpReceiver) -> None:
    prompt = "Tell me about lighthouses. " * 20
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "max_tokens": 8}
    headers = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"}
    httpx.post(f"{default_cluster.state.http_url}/v1/chat/completions", json=body, headers=headers, timeout=60)

    names = ("gateway", "schedule", "prefill", "decode", "kv.push", "kv.wait", "engine.prefill", "engine.decode")
    spans = otlp.wait_for(*names, trace_id=TRACE_ID)

    assert {"kvrelay-coordinator", "kvrelay-prefill-worker", "kvrelay-decode-worker"} <= {s.service for s in spans}
    assert_one_tree(spans)


def test_a_second_up_says_where_the_first_is(default_cluster: LiveCluster) -> None:
    home = default_cluster.output.parent
    environment = {**os.environ, "XDG_STATE_HOME": str(home)}

    second = subprocess.run(
        [sys.executable, "-m", "kvrelay.cli", "up"], env=environment, capture_output=True, text=True, check=False
    )

    assert second.returncode == 1
    assert default_cluster.state.http_url in second.stdout + second.stderr
    assert default_state_dir(environment).exists()


def test_a_long_prompts_blocks_are_there_before_its_compute_ends(default_cluster: LiveCluster) -> None:
    numbers = random.Random(7)
    with Client(default_cluster.state.grpc_address) as client:
        prompt = [numbers.randrange(1000, 40000) for _ in range(1500)]
        generation = client.generate(prompt, max_tokens=2, temperature=0, ignore_eos=True, include_timeline=True)
    counters = generation.timeline.counters
    assert counters["kv.wanted_bytes"] == counters["kv.received_bytes"] > 0
    assert counters["kv.hidden_bytes"] >= 0.9 * counters["kv.wanted_bytes"]


def test_each_engine_is_one_process_on_its_own_cores(default_cluster: LiveCluster) -> None:
    """Its worker stays free to run wherever there is room."""
    given = devices.shares(devices.detect(os.environ), [[], []], 1)
    for role, share in zip(("prefill", "decode"), given, strict=True):
        worker = default_cluster.process_of(f"{role}-worker")
        (engine,) = [child for child in worker.children(recursive=True) if child.name().startswith("VLLM")]
        cores = {int(core) for core in share.environment["VLLM_CPU_OMP_THREADS_BIND"].split(",")}
        assert set().union(*(os.sched_getaffinity(thread.id) for thread in engine.threads())) == cores
        assert all(os.sched_getaffinity(t.id) == os.sched_getaffinity(0) for t in worker.threads())


@pytest.mark.parametrize("command", ["decode-worker", "coordinator"])
async def test_a_killed_child_comes_back(default_cluster: LiveCluster, command: str) -> None:
    victim = default_cluster.process_of(command)
    below = victim.children(recursive=True)

    victim.send_signal(signal.SIGKILL)

    async with asyncio.timeout(180), httpx.AsyncClient() as http:
        while not await _answers(http, default_cluster, victim):
            await asyncio.sleep(0.5)
    assert not [process for process in below if process.is_running()]
    assert "again" in default_cluster.output.read_text()


async def _answers(http: httpx.AsyncClient, cluster: LiveCluster, victim: psutil.Process) -> bool:
    if victim.is_running():
        return False
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 4}
    try:
        answer = await http.post(f"{cluster.state.http_url}/v1/chat/completions", json=body, timeout=60)
    except httpx.TransportError:
        return False
    return answer.status_code == 200
