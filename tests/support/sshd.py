"""An sshd of our own, at which this user may log in by a key of the test."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_PRIVILEGE_SEPARATION = Path("/run/sshd")
_SERVER = """
Port {port}
{listen}
HostKey {directory}/host_key
PidFile none
AuthorizedKeysFile {directory}/key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
"""
_CLIENT = """
Host *
  Port {port}
  IdentityFile {directory}/key
  IdentitiesOnly yes
  UserKnownHostsFile {directory}/known_hosts
  StrictHostKeyChecking accept-new
  LogLevel ERROR
"""


def find_sshd() -> str | None:
    """The absolute path, which sshd demands of whoever calls it."""
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def free_port_pair() -> int:
    """A free port; the next one is free, too."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        return int(probe.getsockname()[1])


@contextmanager
def sshd(binary: str, directory: Path, addresses: Sequence[str]) -> Iterator[Path]:
    """A server at each address; yields a configuration for `ssh -F`. Ends with this context."""
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name], check=True)
    if os.geteuid() == 0:
        _PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)
    port = free_port()
    listen = "\n".join(f"ListenAddress {address}" for address in addresses)
    server, client = directory / "sshd_config", directory / "ssh_config"
    server.write_text(_SERVER.format(port=port, listen=listen, directory=directory))
    client.write_text(_CLIENT.format(port=port, directory=directory))
    process = subprocess.Popen(
        [binary, "-D", "-e", "-f", server], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        waiting = len(addresses)
        log: list[str] = []
        while waiting:
            line = process.stderr.readline()
            assert line, f"sshd ended: {log}"
            log.append(line)
            waiting -= line.startswith("Server listening on")
        yield client
    finally:
        process.terminate()
        process.communicate(timeout=10)
