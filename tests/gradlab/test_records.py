"""ArrayRecord files as a data set, in a real training run."""

import numpy as np
import pytest

from gradlab import pipeline
from gradlab.data import take
from gradlab.records import Records, array_record, write_records
from gradlab.sources import digits
from gradlab.types import ConfigError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder, held, paths = tmp_path_factory.mktemp("records"), digits(), {}
  for name in ("train", "validation", "test"):
    split, paths[name] = getattr(held, name), str(folder / f"{name}.array_record")
    write_records(
      paths[name], (take(split, np.asarray(i)) for i in range(len(split["label"])))
    )
  return paths


def test_records_are_read_back(files):
  held, records = digits().train, Records(files["train"])
  assert len(records) == len(held["label"])
  for index in (0, 7, len(records) - 1):
    for name, values in held.items():
      np.testing.assert_array_equal(records[index][name], values[index])
      assert records[index][name].dtype == values.dtype
  assert array_record(**files).info == {"input_shape": (64,)}


def test_training_from_files_equals_training_from_memory(files, tmp_path):
  def config(data):
    stage = {
      "steps": 20,
      "batch_size": 32,
      "objective": {"name": "cross_entropy"},
      "update": {"adamw": {"learning_rate": 1e-2}},
    }
    model = {"name": "mlp", "features": (8,)}
    return {"data": data, "model": model, "stages": {"train": stage}}

  found = [
    pipeline.run(config(data), tmp_path / str(i))["metrics"]["train"]
    for i, data in enumerate(({"name": "digits"}, {"name": "array_record", **files}))
  ]
  # the same batches; the gather is fused differently
  np.testing.assert_allclose(found[0]["loss"], found[1]["loss"], rtol=1e-5)


def test_missing_file_is_one_sentence(files):
  broken = {"name": "array_record", **files, "test": "nowhere"}
  config = {
    "data": broken,
    "model": {"name": "mlp"},
    "stages": {"test": {"kind": "evaluate", "objective": {"name": "cross_entropy"}}},
  }
  with pytest.raises(ConfigError, match=r"^data: 'nowhere' does not exist\.$"):
    pipeline.build(config)
