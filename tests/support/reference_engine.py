"""One vLLM engine, as the referee: `python -m tests.support.reference_engine MODEL OUTPUT CASES` answers every case.

Runs in a process of its own, before the cluster starts, so that the two do not share cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.equality_cases import CASES, Case

_STRUCTURED = {
    "json_schema": "json",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}


def reference_answers(model: str, cases: str, scratch: Path) -> dict[str, Any]:
    """One engine's answers in float32 to `CASES[cases]`, by name. It has ended on return."""
    target = scratch / "answers.json"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TMPDIR": str(scratch),
        "VLLM_RPC_BASE_PATH": str(scratch),
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch),
    }
    command = [sys.executable, "-m", "tests.support.reference_engine", model, str(target), cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    answers: dict[str, Any] = json.loads(target.read_text())
    return answers


def prompt_ids(tokenizer: Any, case: Case) -> list[int]:
    """The tokens that the case stands for."""
    if isinstance(case.prompt, str):
        ids: list[int] = tokenizer.encode(case.prompt)[: case.num_tokens]
        assert case.num_tokens is None or len(ids) == case.num_tokens, case.name
        return ids
    text = tokenizer.apply_chat_template(case.prompt, add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(text, add_special_tokens=False))


def _sampling(options: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    plain = {name: value for name, value in options.items() if name not in _STRUCTURED}
    for name, field in _STRUCTURED.items():
        if name in options:
            plain["structured_outputs"] = StructuredOutputsParams(**{field: options[name]})
    return SamplingParams(**plain)


def _rows(logprobs: Any) -> list[dict[str, list[float]]] | None:
    if logprobs is None:
        return None
    return [{str(token): [entry.logprob, entry.rank] for token, entry in (row or {}).items()} for row in logprobs]


def answer(llm: Any, tokenizer: Any, case: Case) -> dict[str, Any]:
    """What the engine makes of one case, asked alone."""
    ids = prompt_ids(tokenizer, case)
    output = llm.generate({"prompt_token_ids": ids}, _sampling(case.options), use_tqdm=False)[0]
    return {
        "prompt_token_ids": ids,
        "prompt_logprobs": _rows(output.prompt_logprobs),
        "completions": [
            {
                "token_ids": list(completion.token_ids),
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "logprobs": _rows(completion.logprobs),
            }
            for completion in output.outputs
        ],
    }


def main(model: str, target: str, cases: str) -> None:
    """Answer all cases and write them as JSON."""
    from vllm import LLM

    llm = LLM(model=model, dtype="float32", enforce_eager=True, block_size=32, max_model_len=4096, seed=0)
    tokenizer = llm.get_tokenizer()
    answers = {case.name: answer(llm, tokenizer, case) for case in CASES[cases]()}
    Path(target).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
