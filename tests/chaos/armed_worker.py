"""A worker that can be killed at named points: `python -m tests.chaos.armed_worker DIRECTORY ID COMMAND...`.

The rest of the command line is that of `kvrelay`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvrelay.cli import main
from tests.chaos.points import Trap, end_now

if __name__ == "__main__":
    directory, worker_id = sys.argv[1:3]
    Trap(Path(directory), worker_id, end_now).set_up()
    sys.argv = ["kvrelay", *sys.argv[3:]]
    main()
