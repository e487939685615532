"""What does a person see when something goes wrong, and what does a script? One line, and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

FAILED = 1
WRONG_USAGE = 2
ENGINE_DEAD = 3
UNREACHABLE = 4
INTERRUPTED = 130

EXIT_CODES = (
    f"Exit codes: 0 success; {FAILED} it failed; {WRONG_USAGE} a wrong option, address, file or request;"
    f" {ENGINE_DEAD} the engine died; {UNREACHABLE} nobody answers (coordinator, etcd, workers); {INTERRUPTED} Ctrl-C."
)


def fail(message: str, exit_code: int = FAILED) -> NoReturn:
    """Say what went wrong on stderr, in one line, and leave."""
    one_line = " ".join(message.split())
    print(f"kvrelay: {one_line}", file=sys.stderr)
    raise typer.Exit(exit_code)


@contextmanager
def client_errors() -> Iterator[None]:
    """Turns the client library's exceptions into lines and exit codes."""
    from kvrelay.client import InvalidRequestError, KvrelayError, ModelNotFoundError, NoWorkersError, UnreachableError

    try:
        yield
    except UnreachableError as error:
        fail(f"{error}; start one with `kvrelay up`, or name another with --address HOST:PORT", UNREACHABLE)
    except NoWorkersError as error:
        fail(f"{error}; `kvrelay workers` shows who is there", UNREACHABLE)
    except (InvalidRequestError, ModelNotFoundError) as error:
        fail(str(error), WRONG_USAGE)
    except KvrelayError as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def process_errors(log_level: str) -> Iterator[None]:
    """Turns what stops a process from running into a line and an exit code.

    Anything unforeseen keeps its traceback, and everything does when `log_level` is `debug`.
    """
    from kvrelay.errors import first_leaf
    from kvrelay.etcd import EtcdUnavailableError
    from kvrelay.etcd.server import EtcdServerError
    from kvrelay.launch.engines import EngineOptionsError

    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        cause = first_leaf(error)
        if log_level == "debug":
            raise
        if isinstance(cause, EtcdUnavailableError):
            fail(f"{cause}; start etcd, or correct --etcd", UNREACHABLE)
        if isinstance(cause, EtcdServerError):
            fail(str(cause))
        if isinstance(cause, EngineOptionsError):
            fail(f"{cause}; options of the engine follow after --", WRONG_USAGE)
        if isinstance(cause, ValueError | OSError):
            fail(f"{cause} (--log-level debug shows where)", FAILED)
        raise
