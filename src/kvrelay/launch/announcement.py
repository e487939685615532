"""What is said once the cluster is ready?"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from kvrelay.launch.places import Places
from kvrelay.launch.plan import UpConfig

_QUESTION = "Name the capital of France."


def announcement(config: UpConfig, places: Places, took_s: float) -> Iterator[str]:
    """Lines to print, the addresses and commands in them ready to be pasted."""
    kvrelay = _command(config.environment.get("PATH"))
    workers = f"{config.prefill} prefill, {config.decode} decode"
    yield ""
    yield f"Ready after {took_s:.0f} s: {config.served_model_name} ({workers})"
    yield ""
    yield f"  OpenAI API   {places.http_url}/v1"
    yield f"  gRPC         {places.grpc_address}"
    yield f"  Chat         {kvrelay} chat"
    yield f"  Workers      {kvrelay} workers"
    yield f"  Logs         {places.log_dir}"
    yield ""
    yield curl_line(places.http_url, config.served_model_name)
    yield ""
    yield "Ctrl-C stops everything."


def curl_line(http_url: str, model: str) -> str:
    """A chat request as one shell command."""
    body = {"model": model, "messages": [{"role": "user", "content": _QUESTION}], "max_tokens": 64, "temperature": 0}
    words = ["curl", "-s", f"{http_url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    return shlex.join([*words, "-d", json.dumps(body)])


def _command(path: str | None) -> str:
    """How to call `kvrelay` from here: by name if PATH finds this environment's, else by its path."""
    installed = Path(sys.executable).parent / "kvrelay"
    found = shutil.which("kvrelay", path=path)
    if found is not None and Path(found).resolve() == installed.resolve():
        return "kvrelay"
    try:
        shown = installed.relative_to(Path.cwd())
    except ValueError:
        shown = installed
    return shlex.quote(str(shown))
