"""A short chaos run, in which clients notice nothing."""

from __future__ import annotations

import pytest

from tests.chaos.report import print_report
from tests.chaos.run import ChaosConfig, run_chaos

pytestmark = pytest.mark.timeout(300)

FAULTS = ("kill-decode", "at-frames-landed", "kill-prefill", "reset-worker", "stop-decode", "flip-kv", "wipe-etcd")


async def test_workers_links_and_etcd_fail_and_no_token_is_lost_doubled_or_wrong() -> None:
    config = ChaosConfig(seconds=14.0, faults=FAULTS, every_s=2.0)
    findings = await run_chaos(config, lambda line: print(line, flush=True))
    print_report(findings)
    assert findings.is_good
    assert len(findings.injections) == len(FAULTS)
    assert len(findings.judged) > 50
    assert findings.recovery_s()
