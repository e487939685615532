"""The chaos run: `python -m tests.chaos --seconds 600 --seed 1 --json FILE`.

A cluster of two prefill and two decode workers, two coordinators and etcd serves a steady load while something is
broken every few seconds. Exits with 1 when a request lost, doubled or changed a token, or when something is left.
With a real model, `--engine vllm --once-each --rate 0.7`: what has to come is asked before anything is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.engines import ENGINES, SIMULATED
from tests.chaos.faults.schedule import CATALOGUE, EVERY_S, schedule
from tests.chaos.plans import RATE_PER_S
from tests.chaos.report import print_report, to_json
from tests.chaos.run import ChaosConfig, run_chaos


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    given = _options().parse_args(arguments)
    names = [name for name in given.faults.split(",") if name]
    if unknown := [name for name in names if name not in CATALOGUE]:
        print(f"there is no fault {', '.join(unknown)}; --list tells which there are", file=sys.stderr)
        return 2
    config = ChaosConfig(
        seconds=given.seconds,
        seed=given.seed,
        faults=names,
        every_s=given.every,
        rate_per_s=given.rate,
        keep=given.keep,
        engine=ENGINES[given.engine],
        once_each=given.once_each,
    )
    if given.list:
        _list(config)
        return 0
    findings = asyncio.run(run_chaos(config, _say))
    print_report(findings)
    if given.json is not None:
        given.json.write_text(json.dumps(to_json(findings), indent=2) + "\n")
    return 0 if findings.is_good else 1


def _options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    options.add_argument("--seconds", type=float, default=600.0, help="how long the load lasts")
    options.add_argument(
        "--seed", type=int, default=1, help="of faults, their targets and moments, and of all requests"
    )
    options.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON, too")
    options.add_argument("--faults", default="", metavar="NAME,NAME", help="only these kinds")
    options.add_argument("--every", type=float, default=EVERY_S, metavar="SECONDS", help="between two faults")
    options.add_argument("--rate", type=float, default=RATE_PER_S, metavar="NUMBER", help="requests per second")
    options.add_argument("--engine", choices=ENGINES, default=SIMULATED.name, help="what the workers run")
    options.add_argument(
        "--once-each", action="store_true", help="one fault after the other, each kind once, instead of --seconds"
    )
    options.add_argument("--list", action="store_true", help="show all kinds and this seed's schedule, and end")
    options.add_argument("--keep", action="store_true", help="keep the logs even if all is well")
    return options


def _list(config: ChaosConfig) -> None:
    print("kinds:", ", ".join(CATALOGUE))
    for due in schedule(config.seed, config.seconds, config.faults, config.every_s):
        print(f"{due.at_s:7.1f} s  {due.fault.name} {due.fault.target}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
