"""The comparison with PyTorch compares the same rule."""

import importlib.util
import io

import jax
import numpy as np
import pytest
from rich.console import Console

from gradlab import catalog
from gradlab.launch._bench import peers as bench_peers
from gradlab.launch._bench import report
from gradlab.launch._bench import torch as bench_torch
from gradlab.launch._bench.tree import Sizes
from gradlab.types import ConfigError

TINY = Sizes(layers=1, width=4, vocabulary=8)
needs_torch = pytest.mark.skipif(
  any(importlib.util.find_spec(name) is None for name in bench_torch.PACKAGES),
  reason="PyTorch comes with the extra 'bench', not with 'test'",
)


def _measured(peer=bench_peers.PEERS["adan"]):
  return bench_peers.Measured(
    "adan", peer, "one by one", 1e-8, [10.0, 10.0, 20.0], [5.0, 11.0, 30.0]
  )


def test_speed_is_the_peers_time_over_gradlabs():
  section = bench_peers.section([_measured()], 20_000_000, "torch 2")
  assert section.records[0]["ratio"]["runs"] == [0.5, 1.1, 1.5]
  assert section.checks == [(1.1, 1.0, True)]
  rules = {m.name for m in catalog.methods().values() if m.family == "updates"}
  assert section.notes[0].startswith("without a peer: ")
  alone = section.notes[0].removeprefix("without a peer: ").rstrip(".").split(", ")
  assert set(alone) == rules - set(bench_peers.PEERS)


def test_the_table_fits_the_terminal():
  console = Console(width=report.WIDTH, record=True, file=io.StringIO())
  console.print(report.table(bench_peers.section([_measured()], 20_000_000, "")))
  text = console.export_text()
  assert "…" not in text
  assert "Adan, one by one" in text


def test_gradients_are_not_small():
  leaves = jax.tree.leaves(bench_peers.gradients(TINY, 1))
  assert min(np.abs(leaf).min() for leaf in leaves) >= 0.01
  assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}


def test_without_pytorch_the_user_is_told_how_to_get_it(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert "pip install 'gradlab[bench]'" in bench_torch.missing()
  with pytest.raises(
    ConfigError, match=r"^peers: torch and pytorch_optimizer not inst"
  ):
    bench_peers.measure(5)


@needs_torch
def test_every_variant_takes_the_same_steps_as_gradlabs_rule():
  section = bench_peers.measure(2, TINY, steps=1)
  assert [record["name"] for record in section.records] == list(bench_peers.PEERS)
  for record in section.records:
    assert record["difference"] <= bench_peers.TOLERANCE * bench_peers.RATE
    assert record["variant"] in bench_peers.PEERS[record["name"]].variants
    pairs = zip(record["torch"]["runs"], record["gradlab"]["runs"], strict=True)
    assert record["ratio"]["runs"] == [a / b for a, b in pairs]


@needs_torch
def test_another_rule_is_refused(monkeypatch):
  peer = bench_peers.PEERS["adan"]
  other = peer._replace(given={"betas": (0.98, 0.92, 0.999)})
  monkeypatch.setattr(bench_peers, "PEERS", {"adan": other})
  with pytest.raises(
    ConfigError, match=r"adan and pytorch_optimizer.Adan .* differ by"
  ):
    bench_peers.measure(2, TINY, steps=1)
