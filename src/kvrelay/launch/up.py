"""`kvrelay up`: a whole cluster on this machine, from the first process to the last."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from kvrelay import logs
from kvrelay.etcd import EtcdError
from kvrelay.etcd.server import EtcdServerError, advice, find_etcd, server_arguments
from kvrelay.launch import devices
from kvrelay.launch.announcement import announcement
from kvrelay.launch.display import Display, how_ended, log_tail
from kvrelay.launch.places import Places, new_log_dir, with_port
from kvrelay.launch.plan import ETCD, UpConfig, cluster_specs, coordinator_id, etcd_spec, member_ids, worker_ids
from kvrelay.launch.readiness import Presence, etcd_version, follow_cluster, wait_listening, wait_ready
from kvrelay.launch.run_directory import remove_leftovers, run_directory
from kvrelay.launch.start import Start
from kvrelay.launch.state import AlreadyRunningError, hold
from kvrelay.launch.supervisor import Supervisor, SupervisorConfig, supervise

EXIT_FAILED = 1

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_up(config: UpConfig) -> int:
    """Run until a signal, or until starting turns out to be impossible; returns the exit code.

    The first SIGINT, SIGTERM or SIGHUP ends everything within 10 s, the second one at once.
    """
    display = Display(Console(stderr=False))
    try:
        with hold(config.state_dir) as state:
            if state.previous is not None and remove_leftovers(Path(state.previous.run_dir)):
                display.say("Cleaned up after an earlier run that was killed.")
            with run_directory() as run_dir:
                places = _choose_places(config, run_dir)
                state.write(places.running_cluster(cluster=config.cluster, model=config.served_model_name))
                with (places.log_dir / "up.log").open("a") as log:
                    logs.configure(level=config.log_level, stream=log)
                    return asyncio.run(_Up(config, places, display).run())
    except AlreadyRunningError as error:
        stop = f" Ctrl-C there, or `kill {error.cluster.pid}`, stops it." if error.cluster else ""
        display.say(f"{error}.{stop}")
        return EXIT_FAILED
    except EtcdServerError as error:
        display.say(f"{error}.")
        return EXIT_FAILED


class _Up:
    """One run. Listens to its supervisor."""

    def __init__(self, config: UpConfig, places: Places, display: Display) -> None:
        self._config = config
        self._places = places
        self._display = display
        self._began = time.monotonic()
        self._stop = asyncio.Event()
        self._start = Start()
        self._failed: str | None = None
        self._missing: set[str] = set()
        self._supervisor: Supervisor | None = None
        self._etcd_binary = Path()

    async def run(self) -> int:
        """Until told to stop; returns the exit code. Raises `EtcdServerError` when there is no etcd to start."""
        if not self._config.etcd:
            self._etcd_binary = find_etcd(self._config.etcd_binary)
        with _signal_handler(self._on_signal):
            async with supervise(SupervisorConfig(run_id=self._places.run_dir.name), self) as supervisor:
                self._supervisor = supervisor
                work = asyncio.create_task(self._serve(supervisor), name="serve")
                stop = asyncio.create_task(self._stop.wait(), name="wait for a signal")
                await asyncio.wait([work, stop], return_when=asyncio.FIRST_COMPLETED)
                stop.cancel()
                work.cancel()
                with suppress(asyncio.CancelledError):
                    await work
        if self._failed is not None:
            self._report_failure(self._failed)
            return EXIT_FAILED
        self._display.say(f"Stopped. The logs stay in {self._places.log_dir}")
        return 0

    def on_started(self, name: str, pid: int) -> None:
        if not self._start.is_over:
            for member_id in member_ids(name, self._config):
                self._display.state(member_id, "loading" if name != ETCD else "starting")
        elif name == ETCD:
            self._display.say("etcd runs again.")

    def on_ended(self, name: str, status: int, restart_in_s: float) -> None:
        self._missing.update(member_ids(name, self._config))
        if self._start.is_hopeless(status):
            self._display.say(f"{name} {how_ended(status)}.")
            self._failed = name
            self._stop.set()
            return
        self._display.say(f"{name} {how_ended(status)}; starting it again in {restart_in_s:g} s.")

    def _on_registered(self, member_id: str) -> None:
        if not self._start.is_over:
            self._display.state(member_id, "ready", done=True)
        elif member_id in self._missing:
            self._display.say(f"{member_id} is back.")
        self._missing.discard(member_id)

    def _on_signal(self) -> None:
        if not self._stop.is_set():
            self._display.say("Stopping; once more to kill at once.")
            self._stop.set()
        elif self._supervisor is not None:
            self._supervisor.hurry()

    async def _serve(self, supervisor: Supervisor) -> None:
        """Start everything, say when it is ready, then follow it until cancelled."""
        coordinators = member_ids(coordinator_id(self._config), self._config)
        presence = Presence([*coordinators, *worker_ids(self._config)], self._on_registered)
        async with asyncio.TaskGroup() as tasks:
            with self._display.starting():
                await self._start_etcd(supervisor)
                tasks.create_task(follow_cluster(self._places.etcd, self._config.cluster, presence))
                for spec in cluster_specs(self._config, self._places, devices.detect(self._config.environment)):
                    supervisor.start(spec)
                await presence.wait_complete()
                for port in presence.own_http_ports():
                    await wait_ready(self._places.http_url_at(port))
            self._start.is_over = True
            for line in announcement(self._config, self._places, time.monotonic() - self._began):
                self._display.say(line)

    async def _start_etcd(self, supervisor: Supervisor) -> None:
        if self._config.etcd:
            await self._look_at_etcd()
            return
        host, _, port = self._places.etcd[0].rpartition(":")
        data_dir = self._places.run_dir / "etcd"
        arguments = server_arguments(self._etcd_binary, data_dir, host=host, port=int(port))
        supervisor.start(etcd_spec(arguments, self._config, self._places))
        await wait_listening(self._places.etcd[0])
        self._display.state(ETCD, "ready", done=True)

    async def _look_at_etcd(self) -> None:
        with suppress(EtcdError):
            if text := advice(await etcd_version(self._places.etcd)):
                self._display.say(f"{text}.")

    def _report_failure(self, name: str) -> None:
        path = self._places.log_dir / f"{name}.log"
        self._display.say(f"\nThe end of {path}:\n\n{log_tail(path)}\n\nThe cluster did not start: see above.")


def _choose_places(config: UpConfig, run_dir: Path) -> Places:
    return Places(
        etcd=config.etcd or [with_port("127.0.0.1:0")],
        http=with_port(config.http),
        grpc=with_port(config.grpc),
        log_dir=new_log_dir(config.state_dir),
        run_dir=run_dir,
    )


@contextmanager
def _signal_handler(handler: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
