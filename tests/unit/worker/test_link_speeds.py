"""Speeds of links: large pushes count for more, the latest links stay."""

from __future__ import annotations

import pytest

from kvrelay.worker.link_speeds import LinkSpeeds

MB = 1 << 20


def speeds(links: LinkSpeeds) -> dict[str, float]:
    return {link.address: link.bytes_per_s for link in links}


def test_a_push_tells_the_speed_of_its_link() -> None:
    links = LinkSpeeds()
    links.add("a:1", 100 * MB, 0.1)
    links.add("b:1", 10 * MB, 0.1)
    assert speeds(links) == pytest.approx({"a:1": 1000 * MB, "b:1": 100 * MB})


def test_small_pushes_and_those_without_time_tell_nothing() -> None:
    links = LinkSpeeds()
    links.add("a:1", 100, 0.1)
    links.add("a:1", MB, 0.0)
    assert speeds(links) == {}


def test_a_large_push_counts_for_more_than_a_small_one() -> None:
    links = LinkSpeeds()
    links.add("a:1", 100 * MB, 0.1)
    links.add("a:1", MB, 0.1)
    assert speeds(links)["a:1"] == pytest.approx((80 + 1) * MB / 0.18)


def test_a_lasting_change_is_learnt() -> None:
    links = LinkSpeeds()
    for speed in (1000 * MB, 10 * MB):
        for _ in range(40):
            links.add("a:1", 10 * MB, 10 * MB / speed)
    assert speeds(links)["a:1"] == pytest.approx(10 * MB, rel=0.05)


def test_the_link_that_was_idle_longest_is_forgotten() -> None:
    links = LinkSpeeds(max_links=2)
    for address in ("a:1", "b:1", "a:1", "c:1"):
        links.add(address, MB, 0.1)
    assert set(speeds(links)) == {"a:1", "c:1"}
