"""PyTorch's decoder is gradlab's, and the numbers are tokens per second."""

import importlib.util

import pytest

from gradlab.launch._bench import decoder, torch, torch_decoder
from gradlab.types import ConfigError

TINY = decoder.SMALL._replace(layers=2, width=16, heads=2, context=8, batch=4, steps=2)
needs_torch = pytest.mark.skipif(
  any(importlib.util.find_spec(name) is None for name in torch.PACKAGES),
  reason="PyTorch comes with the extra 'bench', not with 'test'",
)


def test_speed_is_gradlabs_tokens_over_pytorchs():
  ours, theirs = [100.0, 300.0, 90.0], [100.0, 200.0, 100.0]
  section = decoder.section(ours, theirs, TINY, 10_600_000, 1e-7)
  assert section.records[0]["ratio"]["runs"] == [1.0, 1.5, 0.9]
  assert section.checks == [(1.0, 1.0, True)]
  assert "10.6 million parameters" in section.says


def test_a_cpu_leaves_it_out():
  assert "--only=decoder" in decoder.missing()


@needs_torch
def test_the_losses_agree_and_both_sides_are_timed():
  section = decoder.measure(2, TINY, compiled=False)
  [record] = section.records
  assert record["loss_difference"] <= 1e-4
  pairs = zip(record["gradlab"]["runs"], record["torch"]["runs"], strict=True)
  assert record["ratio"]["runs"] == [a / b for a, b in pairs]


@needs_torch
def test_another_model_is_refused(monkeypatch):
  monkeypatch.setattr(torch_decoder, "MAX_WAVELENGTH", 10.0)
  # The first losses hardly depend on the positions: the embedding is small.
  monkeypatch.setattr(decoder, "TOLERANCE", 1e-7)
  with pytest.raises(ConfigError, match="decoder: the losses differ"):
    decoder.measure(2, TINY, compiled=False)


@needs_torch
def test_training_takes_the_same_steps():
  ours = decoder.pipeline(TINY, "float32")
  params, run = decoder.stepper(ours, TINY.steps)
  with torch.quiet():
    theirs = decoder.Torch(params, ours.dataset.train, TINY, compiled=False)
    last = theirs.run()
  assert float(run()["loss"][-1]) == pytest.approx(float(last), abs=1e-4)
