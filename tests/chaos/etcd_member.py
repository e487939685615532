"""An etcd server whose data can be taken away: `python -m tests.chaos.etcd_member DIRECTORY PORT`.

It starts empty, as another cluster, when the directory has a file called `wipe`, and with its data otherwise.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from pathlib import Path

from kvrelay.etcd.server import find_etcd, server_arguments

WIPE = "wipe"
"""The file's name."""


def main(directory: Path, port: int) -> None:
    """Becomes the server."""
    data, token = directory / "data", directory / "token"
    if (directory / WIPE).exists():
        shutil.rmtree(data, ignore_errors=True)
        token.unlink(missing_ok=True)
        (directory / WIPE).unlink()
    if not token.exists():
        token.write_text(secrets.token_hex(8))
    arguments = server_arguments(find_etcd(), data, port=port, token=token.read_text())
    os.execv(arguments[0], arguments)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
