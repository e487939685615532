"""A child that dies again and again is started ever more slowly."""

from __future__ import annotations

from kvrelay.launch.supervisor import RestartDelay, SupervisorConfig

CONFIG = SupervisorConfig(run_id="r", first_delay_s=1.0, max_delay_s=8.0, healthy_s=60.0)


def test_doubles_up_to_the_limit() -> None:
    delay = RestartDelay(CONFIG)
    assert [delay.after(0.1) for _ in range(5)] == [1.0, 2.0, 4.0, 8.0, 8.0]


def test_starts_anew_after_a_healthy_run() -> None:
    delay = RestartDelay(CONFIG)
    for _ in range(4):
        delay.after(0.1)
    assert delay.after(60.0) == 1.0
    assert delay.after(59.0) == 2.0
