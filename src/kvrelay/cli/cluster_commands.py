"""The commands that run a coordinator, or a whole cluster on this machine: coordinator, up."""

from __future__ import annotations


def up() -> None:
    """Run a whole cluster."""


def coordinator() -> None:
    """Run one coordinator."""
