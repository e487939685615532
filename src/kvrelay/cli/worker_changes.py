"""How do commands that change a running worker tell of progress and of what went wrong?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvrelay.cli.failure import FAILED, UNREACHABLE, WRONG_USAGE, fail
from kvrelay.cli.parsing import Addresses


@contextmanager
def worker_errors(etcd: Addresses) -> Iterator[None]:
    """Leaves with a message when the change cannot be, or takes too long."""
    from kvrelay.client.roles import RoleRefusedError, StillBusyError, WorkerSilentError
    from kvrelay.etcd import EtcdError, EtcdUnavailableError

    try:
        yield
    except RoleRefusedError as error:
        fail(str(error), WRONG_USAGE)
    except StillBusyError as error:
        fail(str(error), FAILED)
    except WorkerSilentError as error:
        fail(str(error), UNREACHABLE)
    except EtcdUnavailableError as error:
        fail(f"no etcd answers at {etcd}: {error}", UNREACHABLE)
    except EtcdError as error:
        fail(f"etcd at {etcd} refuses: {error}", FAILED)


def left_over(worker_id: str, what: str) -> Callable[[int], None]:
    """Says how many requests are left, whenever that changes."""
    told = 0

    def show(num_left: int) -> None:
        nonlocal told
        if num_left != told:
            told = num_left
            print(f"{worker_id} still has {num_left} {what}", file=sys.stderr, flush=True)

    return show
