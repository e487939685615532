"""A supervisor as a process of its own: `python -m tests.support.supervised RUN_ID LOG_DIR COMMAND...`.

SIGTERM ends it in order, a second one in a hurry. Its one child is called `child`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from kvrelay.launch.supervisor import ChildSpec, SupervisorConfig, supervise


class Silent:
    """Hears nothing."""

    def on_started(self, name: str, pid: int) -> None:
        """Nothing."""

    def on_ended(self, name: str, status: int, restart_in_s: float) -> None:
        """Nothing."""


async def main(run_id: str, log_dir: Path, command: list[str]) -> None:
    """Until SIGTERM."""
    stop = asyncio.Event()
    async with supervise(SupervisorConfig(run_id=run_id, grace_s=1.0), Silent()) as supervisor:
        asyncio.get_running_loop().add_signal_handler(
            signal.SIGTERM, lambda: supervisor.hurry() if stop.is_set() else stop.set()
        )
        log = log_dir / "child.log"
        supervisor.start(ChildSpec(name="child", arguments=command, environment=dict(os.environ), log_path=log))
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
