"""Every input that fuzzing has kept, again: what once reached something new, or broke something, breaks nothing."""

from __future__ import annotations

import pytest

from tests.fuzz.catalogue import TARGETS, kept_inputs
from tests.fuzz.target import Target


@pytest.mark.timeout(300)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_no_input_breaks_anything(target: Target) -> None:
    inputs = [*target.seeds(), *(kept.read_bytes() for kept in kept_inputs(target.name))]
    assert len(inputs) > 10, "the corpus is kept"
    with target.open() as check:
        for data in inputs:
            try:
                check(data)
            except Exception as error:
                error.add_note(f"input: {data!r}")
                raise
