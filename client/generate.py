"""How does one completion reach the terminal or a script?"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable

from kvrelay.client.blocking_client import Client
from kvrelay.client.options import GenerateOptions, Prompt
from kvrelay.client.results import Collector


def print_stream(client: Client, prompt: Prompt, options: GenerateOptions, write: Callable[[str], None]) -> bool:
    """Write the text as it comes, and a line end after it. With `n` > 1, one completion after the other at the end.

    Returns whether the model said anything at all.
    """
    if options.get("n", 1) > 1:
        result = client.generate(prompt, **options)
        for i, completion in enumerate(result.completions):
            write(f"[{i}] {completion.text}\n")
        return any(completion.text for completion in result.completions)
    any_text = False
    with client.stream(prompt, **options) as chunks:
        for chunk in chunks:
            write(chunk.text)
            any_text = any_text or bool(chunk.text)
    write("\n")
    return any_text


def print_json(client: Client, prompt: Prompt, options: GenerateOptions, write: Callable[[str], None]) -> None:
    """Write one JSON object: every field of the `Generation`, and `ttft_s` and `e2e_s` as seen from here."""
    started_s = time.monotonic()
    ttft_s = None
    collector = Collector()
    with client.stream(prompt, **options) as chunks:
        for chunk in chunks:
            if ttft_s is None and chunk.token_ids:
                ttft_s = time.monotonic() - started_s
            collector.add(chunk)
    result = dataclasses.asdict(collector.result())
    result |= {"ttft_s": ttft_s, "e2e_s": time.monotonic() - started_s}
    write(json.dumps(result, ensure_ascii=False) + "\n")
