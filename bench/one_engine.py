"""One vLLM engine in a process of its own, as the other arm: `python -m bench.one_engine MODEL [VLLM OPTIONS]`.

Reads a JSON list of token ids a line, answers with the seconds to each token from the call of `generate`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence


class OneEngine:
    """The parent's side."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def token_times_s(self, prompt: Sequence[int]) -> list[float]:
        """Seconds from the call to each token."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(list(prompt)) + "\n")
        self._process.stdin.flush()
        return list(json.loads(self._read()))

    def _read(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("["):
                return line
        raise RuntimeError("the single engine has ended")


@contextlib.contextmanager
def one_engine(model: str, cores: str, scratch: str, options: Sequence[str] = ()) -> Iterator[OneEngine]:
    """Start an engine on `cores`; it is ready inside the context."""
    environment = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_RPC_BASE_PATH": scratch,
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
        "TORCHINDUCTOR_CACHE_DIR": scratch,
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "bench.one_engine", model, *options]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        engine = OneEngine(process)
        engine.token_times_s(range(1000, 1040))
        yield engine
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)


async def _serve(model: str, options: Sequence[str]) -> None:
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.async_llm import AsyncLLM

    defaults = ["--model", model, "--enforce-eager", "--block-size", "32"]
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(parser.parse_args([*defaults, *options])))
    params = SamplingParams(
        temperature=0, max_tokens=4, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )
    loop = asyncio.get_running_loop()
    number = 0
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        number += 1
        times: list[float] = []
        began = time.perf_counter()
        async for output in engine.generate({"prompt_token_ids": json.loads(line)}, params, f"request-{number}"):
            times += [time.perf_counter() - began] * len(output.outputs[0].token_ids)
        print(json.dumps(times), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], sys.argv[2:]))
