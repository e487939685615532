"""`--help` everywhere, and at once."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from kvrelay import __version__
from kvrelay.cli import app

COMMANDS = [
    *("up", "coordinator", "prefill-worker", "decode-worker"),
    *("chat", "generate", "workers", "replay", "compare", "simulate", "version"),
]
HEAVY = {"grpc", "matplotlib", "numpy", "vllm", "torch", "opentelemetry", "fastapi", "google"}


def test_the_commands() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert all(command in result.stdout for command in COMMANDS)
    assert "Exit codes" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert command in ("version", "workers") or "Example: kvrelay" in result.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom kvrelay.cli import app\nsys.argv = ['kvrelay', '--help']\n"
        f"try: app()\nexcept SystemExit: pass\nprint(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"


def test_the_version() -> None:
    assert CliRunner().invoke(app, ["version"]).stdout.strip() == __version__
