"""One vLLM engine, as the referee: `python -m tests.support.reference_engine MODEL DTYPE OUTPUT` answers every case.

Runs in a process of its own, before the cluster starts, so that the two do not share cores.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.support.equality_cases import Case, length_cases, option_cases

_STRUCTURED = {
    "json_schema": "json",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}


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


def main(model: str, dtype: str, target: str) -> None:
    """Answer all cases and write them as JSON."""
    from vllm import LLM

    llm = LLM(model=model, dtype=dtype, enforce_eager=True, block_size=32, max_model_len=4096, seed=0)
    tokenizer = llm.get_tokenizer()
    answers = {case.name: answer(llm, tokenizer, case) for case in [*length_cases(), *option_cases()]}
    Path(target).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
