"""The comparison with PyTorch compares the same rule."""

import importlib.util
import io

import jax
import numpy as np
import pytest
from rich.console import Console

from gradlab import catalog
from gradlab.launch import _bench_peers, _bench_torch
from gradlab.launch import _bench_report as report
from gradlab.launch._bench_tree import Sizes
from gradlab.types import ConfigError

TINY = Sizes(layers=1, width=4, vocabulary=8)
needs_torch = pytest.mark.skipif(
  any(importlib.util.find_spec(name) is None for name in _bench_torch.PACKAGES),
  reason="PyTorch comes with the extra 'bench', not with 'test'",
)


def _measured(peer=_bench_peers.PEERS["adan"]):
  return _bench_peers.Measured(
    "adan", peer, "one by one", 1e-8, [10.0, 10.0, 20.0], [5.0, 11.0, 30.0]
  )


def test_speed_is_the_peers_time_over_gradlabs():
  section = _bench_peers.section([_measured()], 20_000_000, "torch 2")
  assert section.records[0]["ratio"]["runs"] == [0.5, 1.1, 1.5]
  assert section.checks == [(1.1, 1.0, True)]
  rules = {m.name for m in catalog.methods().values() if m.family == "updates"}
  assert section.notes[0].startswith("without a peer: ")
  alone = section.notes[0].removeprefix("without a peer: ").rstrip(".").split(", ")
  assert set(alone) == rules - set(_bench_peers.PEERS)


def test_the_table_fits_the_terminal():
  console = Console(width=report.WIDTH, record=True, file=io.StringIO())
  console.print(report.table(_bench_peers.section([_measured()], 20_000_000, "")))
  text = console.export_text()
  assert "…" not in text
  assert "Adan, one by one" in text


def test_gradients_are_not_small():
  leaves = jax.tree.leaves(_bench_peers.gradients(TINY, 1))
  assert min(np.abs(leaf).min() for leaf in leaves) >= 0.01
  assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}


def test_without_pytorch_the_user_is_told_how_to_get_it(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert "pip install 'gradlab[bench]'" in _bench_torch.missing()
  with pytest.raises(
    ConfigError, match=r"^peers: torch and pytorch_optimizer not inst"
  ):
    _bench_peers.measure(5)


@needs_torch
def test_every_variant_takes_the_same_steps_as_gradlabs_rule():
  section = _bench_peers.measure(2, TINY, steps=1)
  assert [record["name"] for record in section.records] == list(_bench_peers.PEERS)
  for record in section.records:
    assert record["difference"] <= _bench_peers.TOLERANCE * _bench_peers.RATE
    assert record["variant"] in _bench_peers.PEERS[record["name"]].variants
    pairs = zip(record["torch"]["runs"], record["gradlab"]["runs"], strict=True)
    assert record["ratio"]["runs"] == [a / b for a, b in pairs]


@needs_torch
def test_another_rule_is_refused(monkeypatch):
  peer = _bench_peers.PEERS["adan"]
  other = peer._replace(given={"betas": (0.98, 0.92, 0.999)})
  monkeypatch.setattr(_bench_peers, "PEERS", {"adan": other})
  with pytest.raises(
    ConfigError, match=r"adan and pytorch_optimizer.Adan .* differ by"
  ):
    _bench_peers.measure(2, TINY, steps=1)
