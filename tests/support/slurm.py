"""Slurm as far as a job of one node needs it: `scontrol show hostnames`, and `srun` that runs its tasks right here."""

from __future__ import annotations

import sys
from pathlib import Path

NODE = "127.0.0.1"

_SCONTROL = f"""#!/bin/sh
[ "$1 $2" = "show hostnames" ] && echo {NODE}
"""
# Tasks in the background get the signals that srun gets; srun ends with the last of them.
_SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys

arguments = sys.argv[1:]
options = {{}}
while arguments[0].startswith("--"):
    name, _, value = arguments.pop(0).partition("=")
    options[name] = value
tasks = []
for task in range(int(options["--ntasks"])):
    environment = {{**os.environ, "SLURM_PROCID": str(task), "SLURMD_NODENAME": "{NODE}"}}
    with open(options["--output"].replace("%t", str(task)), "w") as log:
        tasks.append(subprocess.Popen(arguments, env=environment, stdout=log, stderr=log))
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""


def install(directory: Path) -> None:
    """Put both commands into a folder that a test has on its PATH."""
    for name, text in (("scontrol", _SCONTROL), ("srun", _SRUN)):
        path = directory / name
        path.write_text(text)
        path.chmod(0o755)
