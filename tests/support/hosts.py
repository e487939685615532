"""Hosts of their own on one machine: network namespaces with a bridge between them, whose cables can be pulled."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_NETWORK = "10.213.87"
"""Nobody routes it on a machine that runs tests."""


class NoHostsError(RuntimeError):
    """They cannot be made here; the message says why."""


@dataclass(frozen=True, slots=True)
class Host:
    """One namespace. What runs in it reaches the others, and this process, through its cable."""

    name: str
    address: str
    cable: str
    """Its end at the bridge."""

    def command(self, arguments: Sequence[str]) -> list[str]:
        """That runs these in it."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def unplug(self) -> None:
        """Nothing goes in or out any more, and nobody is told."""
        _ip("link", "set", self.cable, "down")

    def plug_in(self) -> None:
        _ip("link", "set", self.cable, "up")


@dataclass(frozen=True, slots=True)
class Hosts:
    """Made by `open_hosts`."""

    own_address: str
    """Of this process in their network."""
    hosts: Sequence[Host]


@contextlib.contextmanager
def open_hosts(number: int) -> Iterator[Hosts]:
    """Raises `NoHostsError` where they cannot be had. What runs in them must have ended at the exit."""
    if os.geteuid():
        raise NoHostsError("network namespaces take root")
    if shutil.which("ip") is None:
        raise NoHostsError("there is no `ip`; on Debian it is in iproute2")
    run = secrets.token_hex(2)
    bridge = f"kvr{run}"
    with contextlib.ExitStack() as stack:
        try:
            _add(stack, bridge, "type", "bridge")
            _ip("address", "add", f"{_NETWORK}.1/24", "dev", bridge)
            _ip("link", "set", bridge, "up")
            hosts = [_host(stack, bridge, f"{bridge}-{index}", index) for index in range(number)]
        except subprocess.CalledProcessError as error:
            raise NoHostsError(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error
        yield Hosts(f"{_NETWORK}.1", hosts)


def _host(stack: contextlib.ExitStack, bridge: str, name: str, index: int) -> Host:
    address, cable = f"{_NETWORK}.{index + 2}", f"{bridge}c{index}"
    _ip("netns", "add", name)
    stack.callback(_ip, "netns", "del", name)
    _add(stack, cable, "type", "veth", "peer", "name", "eth0", "netns", name)
    _ip("link", "set", cable, "master", bridge, "up")
    _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _ip("-n", name, "link", "set", device, "up")
    return Host(name, address, cable)


def _add(stack: contextlib.ExitStack, device: str, *kind: str) -> None:
    _ip("link", "add", device, *kind)
    stack.callback(_ip, "link", "del", device)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=10)
