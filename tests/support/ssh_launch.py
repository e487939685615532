"""deploy/launch/ssh.sh with a hostfile, as a person would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy/launch/ssh.sh"


@dataclass(frozen=True, slots=True, kw_only=True)
class SshLaunch:
    """One hostfile and the settings to use it with."""

    hostfile: Path
    environment: Mapping[str, str]

    def __call__(self, *arguments: str, timeout_s: float = 240.0) -> subprocess.CompletedProcess[str]:
        """The finished command with its output."""
        return subprocess.run(
            [SCRIPT, self.hostfile, *arguments],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def running(self, *arguments: str) -> subprocess.Popen[str]:
        """The command with a pipe from its standard output; the caller ends it."""
        command = [str(SCRIPT), str(self.hostfile), *arguments]
        return subprocess.Popen(
            command, env=self._environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )

    def _environment(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("KVRELAY_")}
        return {**own, **self.environment}


def make_launch(directory: Path, hostfile: str, **environment: str) -> SshLaunch:
    """Write the hostfile; the kvrelay command is the one next to this interpreter."""
    path = directory / "hosts"
    path.write_text(hostfile)
    command = str(Path(sys.executable).with_name("kvrelay"))
    return SshLaunch(hostfile=path, environment={"KVRELAY_COMMAND": command, **environment})


def processes_with(setting: str) -> list[str]:
    """The command lines of the live processes whose environment has this `NAME=value`."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                if setting.encode() in (process / "environ").read_bytes().split(b"\0"):
                    found.append((process / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
    return found
