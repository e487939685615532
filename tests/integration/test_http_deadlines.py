"""An answer over HTTP that is wanted until a certain time: then the client is told, and the workers are free."""

from __future__ import annotations

import asyncio
import json

import pytest

from kvrelay.coordinator.front_end import FrontEnd
from tests.support.fake_cluster import until
from tests.support.fake_worker import delta
from tests.support.gateway import gateway

COMPLETIONS = "/v1/completions"
TIMEOUT_S = "0.3"
FREED_S = 1.0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_deadline_before_the_first_token_is_504(front_end: FrontEnd, stream: bool) -> None:
    async with gateway(front_end) as served:
        body = {"prompt": [1] * 10, "max_tokens": 5, "stream": stream}
        answer = await served.post(COMPLETIONS, body, **{"x-kvrelay-timeout-s": TIMEOUT_S})
        assert answer.status_code == 504
        assert answer.json()["error"]["type"] == "TimeoutError"
        assert "deadline" in answer.json()["error"]["message"]
        (prefill,) = served.cluster.prefill.messages("prefill")
        assert 0 < prefill.timeout_ms < 2000
        await until(lambda: "cancel" in served.cluster.prefill.kinds(), FREED_S)
        served.cluster.assert_idle()


@pytest.mark.parametrize("plain", [False, True], ids=["vLLM's stream", "plain stream"])
async def test_a_deadline_in_mid_stream_is_its_last_event(front_end: FrontEnd, plain: bool) -> None:
    async with gateway(front_end, with_plain_streams=plain) as served:
        body = {"prompt": [1], "max_tokens": 50, "temperature": 0, "stream": True}
        asking = asyncio.create_task(served.post(COMPLETIONS, body, **{"x-kvrelay-timeout-s": TIMEOUT_S}))
        (decode,) = await served.cluster.decode.wait_for("decode")
        served.cluster.decode.send(delta(decode.request_id, [40]))
        answer = await asking
        assert answer.status_code == 200
        *_, last, done = [line for line in answer.text.split("\n\n") if line]
        assert done == "data: [DONE]"
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == 504
        await until(lambda: "cancel" in served.cluster.decode.kinds(), FREED_S)
        served.cluster.assert_idle()


async def test_a_deadline_that_is_none_is_told(front_end: FrontEnd) -> None:
    async with gateway(front_end) as served:
        answer = await served.post(COMPLETIONS, {"prompt": [1]}, **{"x-kvrelay-timeout-s": "soon"})
        assert answer.status_code == 400
        assert "x-kvrelay-timeout-s" in answer.json()["error"]["message"]
