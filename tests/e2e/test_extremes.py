"""Requests at the edge of what is allowed: real engines answer every one of them, or refuse it, and live on."""

from __future__ import annotations

from typing import Any

import httpx
import psutil
import pytest

from tests.support.live_cluster import LiveCluster

pytestmark = pytest.mark.timeout(600)

PROMPT = "The lighthouse keeper wrote in his diary that the sea was calm, and that he had seen a ship. " * 3
_INT64 = 2**63

ANSWERED: list[dict[str, Any]] = [
    {"temperature": 2},
    {"temperature": 1e-300},
    {"top_p": 1e-6, "temperature": 1},
    {"top_k": 2**31 - 1},
    {"top_k": -1},
    {"min_p": 1},
    {"seed": -_INT64},
    {"seed": _INT64 - 1},
    {"repetition_penalty": 0.01},
    {"repetition_penalty": 10},
    {"presence_penalty": 2, "frequency_penalty": -2},
    {"min_tokens": 4},
    {"min_tokens": 4, "allowed_token_ids": [2]},
    {"min_tokens": 4, "allowed_token_ids": [2], "stop_token_ids": list(range(256))},
    {"allowed_token_ids": [7], "logit_bias": {"7": -100}},
    {"allowed_token_ids": [7], "bad_words": ["the"]},
    {"logit_bias": {str(token): 100 for token in range(1024)}},
    {"logit_bias": {str(token): -100 for token in range(1024)}, "temperature": 0},
    {"bad_words": [f"word{number} of many" for number in range(128)]},
    {"stop": [chr(97 + number) * 256 for number in range(16)]},
    {"stop": ["\u0000", "\U0010ffff", "\ufffd"]},
    {"logprobs": 20, "prompt_logprobs": 20, "echo": True},
    {"n": 128, "max_tokens": 1, "temperature": 1},
    {"n": 8, "seed": 5, "temperature": 1},
    {"priority": 2**31 - 1},
    {"cache_salt": "s" * 128},
    {"ignore_eos": True, "stop_token_ids": [2]},
    {"prompt": [49151]},
    {"prompt": [[0], [49151] * 40, [1] * 1000]},
    {"prompt": "\u0000\ud7ff\uffff\U0001f600" * 20},
    {"prompt": [PROMPT] * 40},
    {"structured_outputs": {"regex": "(a{1,1000}){1,1000}"}},
    {"structured_outputs": {"regex": "a{1,100000}"}},
    {"structured_outputs": {"regex": "$^"}},
    {"structured_outputs": {"regex": "(?=a)b"}},
    {"structured_outputs": {"choice": ["a" * 1000, "\u0000", "\U0001f600"]}},
    {"structured_outputs": {"choice": [f"choice {number}" for number in range(2000)]}},
    {"structured_outputs": {"grammar": 'root ::= root root | "a"'}},
    {"structured_outputs": {"grammar": "root ::= missing"}},
    {"structured_outputs": {"grammar": 'start: "a"+'}},
    {"structured_outputs": {"json_object": True}},
    {"structured_outputs": {"json": {"type": "object"}, "whitespace_pattern": "("}},
    {"structured_outputs": {"json": {"type": "string", "maxLength": 10**6}}},
    {"structured_outputs": {"json": {"type": "string", "minLength": 10**9}}},
    {"structured_outputs": {"json": {"type": "array", "minItems": 5, "maxItems": 2}}},
    {"structured_outputs": {"json": {"type": "integer", "minimum": 5, "maximum": 2}}},
    {"structured_outputs": {"json": {"type": "number", "multipleOf": 0}}},
    {"structured_outputs": {"json": {"type": "string", "pattern": "("}}},
    {"structured_outputs": {"json": {"enum": []}}},
    {"structured_outputs": {"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}}},
    {"structured_outputs": {"json": {"patternProperties": {"(": {"type": "string"}}}}},
    {"structured_outputs": {"json": {"properties": {f"p{number}": {"type": "string"} for number in range(800)}}}},
    {"structured_outputs": {"json": '{"type": "object"'}},
    {"structured_outputs": {"structural_tag": '{"type": "structural_tag", "format": {"type": "any_text"}}'}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
    {"response_format": {"type": "json_object"}, "n": 2, "temperature": 1},
]
"""Fields of a completion; 400 is a good answer, too."""

UNSATISFIABLE: list[dict[str, Any]] = [
    {"structured_outputs": {"regex": "[^\\s\\S]"}},
    {"structured_outputs": {"grammar": "root ::= "}},
    {"structured_outputs": {"json": {"$ref": "#"}}},
    {"structured_outputs": {"regex": "a"}, "allowed_token_ids": [7], "min_tokens": 4},
]
"""Constraints that no output meets, which turns out when an engine generates: the request fails there, alone."""


def engines_of(cluster: LiveCluster) -> set[psutil.Process]:
    return {child for child in cluster.children() if "VLLM" in child.name()}


def test_no_allowed_request_ends_an_engine(default_cluster: LiveCluster) -> None:
    engines = engines_of(default_cluster)
    assert engines
    failed = []
    # The first log probabilities take an engine on a CPU half a minute: it compiles their kernel.
    with httpx.Client(base_url=default_cluster.state.http_url, timeout=180) as client:
        for number, fields in enumerate([*ANSWERED, *UNSATISFIABLE]):
            body = {"prompt": PROMPT, "max_tokens": 4, "stream": number % 2 == 0, **fields}
            if "prompt_logprobs" in fields:
                body["stream"] = False
            response = client.post("/v1/completions", json=body)
            good = (200, 400) if fields in ANSWERED else (200, 400, 500)
            if response.status_code not in good or ('"code":500' in response.text and 500 not in good):
                failed.append((str(fields)[:200], response.text[-500:]))
            assert engines_of(default_cluster) == engines, str(fields)[:200]
        plain = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 4})
    assert not failed
    assert plain.json()["usage"]["completion_tokens"] == 4
