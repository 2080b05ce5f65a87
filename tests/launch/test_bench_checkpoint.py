"""What a save costs is measured beside one that the loop waits for."""

import jax
import pytest

from gradlab.launch._bench import checkpoint
from gradlab.launch._bench.tree import tree_bytes


def test_the_state_has_the_size_that_was_asked_for():
  loop = checkpoint.Loop(0.6)
  assert tree_bytes(loop.state) == pytest.approx(0.6e6, rel=1e-3)
  before = jax.tree.structure(loop.state)
  assert jax.tree.structure(loop.run(2)) == before


def test_stalls_are_ratios_to_the_blocking_save():
  runs = [checkpoint.Run(blocking=1.0, held=0.05, slowed=0.1)] * 2
  section = checkpoint.section(runs, size=200.0, step=0.02, steps=9)
  held, both = section.records
  assert held["ratio"]["median"] == 0.05
  assert both["ratio"]["median"] == pytest.approx(0.15)
  assert [check.met for check in section.checks] == [True, False]


def test_every_run_saves_twice():
  section = checkpoint.measure(2, megabytes=0.1)
  for record in section.records:
    assert len(record["ratio"]["runs"]) == 2
    assert record["blocking"]["median"] > 0
    assert record["steps"] * record["step_seconds"] > 0
  assert section.records[0]["stall"]["median"] > 0
