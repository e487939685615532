"""What does `kvrelay workers` print?"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import TYPE_CHECKING

from kvrelay.cli.failure import FAILED, UNREACHABLE, fail
from kvrelay.cli.parsing import Addresses

if TYPE_CHECKING:
    from kvrelay.client.workers import WorkerRow

_STYLES = {"ready": "green", "draining": "yellow", "silent": "red"}


def show_workers(etcd: Addresses, cluster: str, *, as_json: bool, timeout_s: float) -> None:
    """Print the table, or the JSON array."""
    from kvrelay.client.workers import collect_workers
    from kvrelay.etcd import EtcdError, EtcdUnavailableError

    try:
        rows = asyncio.run(collect_workers([str(address) for address in etcd], cluster, timeout_s))
    except EtcdUnavailableError as error:
        fail(f"no etcd answers at {etcd}: {error}", UNREACHABLE)
    except EtcdError as error:
        fail(f"etcd at {etcd} refuses: {error}", FAILED)
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    elif rows:
        _print_table(rows)
    else:
        fail(f"no worker is registered in cluster {cluster!r} at {etcd}", UNREACHABLE)


def _print_table(rows: list[WorkerRow]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("id", "role", "model", "address", "state"):
        table.add_column(heading, overflow="fold")
    has_disk = any(row.disk_bytes for row in rows)
    for heading in ("running", "waiting", "engine KV", "store KV", "cached", *(["on disk"] if has_disk else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        style = _STYLES.get(row.state, "")
        state = f"[{style}]{row.state}[/]" if style else row.state
        table.add_row(row.worker_id, row.role, row.model, row.address, state, *_gauges(row, has_disk))
    console = Console()
    # Piped output is for other programs: every row stays one line.
    (console if console.is_terminal else Console(width=200)).print(table)


def _gauges(row: WorkerRow, has_disk: bool) -> list[str]:
    on_disk = [str(row.num_disk_blocks) if row.disk_bytes else "-"] if has_disk else []
    if row.engine_kv_usage is None:
        return ["-"] * 5 + on_disk
    return [
        str(row.num_running_requests),
        str(row.num_waiting_requests),
        f"{row.engine_kv_usage:.0%}",
        f"{row.num_used_slots}/{row.num_slots}",
        str(row.num_cached_slots),
        *on_disk,
    ]
