"""Metrics: whole records or none, the right windows, and one dispatch of delay."""

import json
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradlab.metrics import Delayed, Writer, first_nonfinite, read
from tests.gradlab.test_table import table

ROOT = Path(__file__).parents[2]


def no_constants(name):
  raise AssertionError(f"{name} is not JSON")


def test_records_are_strict_json_and_read_inverts_them(tmp_path):
  values = {"loss": jnp.float32(0.1), "norm": np.inf, "low": -np.inf, "gap": np.nan}
  with Writer(tmp_path, start_step=0, tensorboard=False) as writer:
    writer.write(1, values, "validation")
    writer.write(2, {"count": 3, "half": jnp.bfloat16(1.5), "one": np.ones(1)}, "nan")
  path = tmp_path / "metrics.jsonl"
  lines = path.read_text().splitlines()
  first = json.loads(lines[0], parse_constant=no_constants)
  assert first == {
    "step": 1,
    "split": "validation",
    "loss": float(np.float32(0.1)),
    "norm": "inf",
    "low": "-inf",
    "gap": "nan",
  }
  records = read(path)
  assert records[0]["norm"] == np.inf
  assert records[0]["low"] == -np.inf
  assert np.isnan(records[0]["gap"])
  # The name of a split is no number, whatever it is.
  assert records[1] == {"step": 2, "split": "nan", "count": 3, "half": 1.5, "one": 1.0}


def test_each_record_is_one_write_per_file(tmp_path, monkeypatch):
  written = []
  write = os.write

  def spy(file, data):
    written.append(bytes(data))
    return write(file, data)

  with Writer(tmp_path, start_step=0, tensorboard=False) as writer:
    writer.log([1], {"loss": np.zeros(1)})
    monkeypatch.setattr(os, "write", spy)
    writer.log([2, 3], {"loss": np.array([0.5, np.nan])})
    monkeypatch.undo()
  assert written == [
    b'{"step": 2, "split": "train", "loss": 0.5}\n',
    b"2,train,0.5\r\n",
    b'{"step": 3, "split": "train", "loss": "nan"}\n',
    b"3,train,nan\r\n",
  ]
  for name, rows in (("metrics.jsonl", written[::2]), ("metrics.csv", written[1::2])):
    assert (tmp_path / name).read_bytes().endswith(b"".join(rows))


def test_a_record_that_a_full_disk_takes_in_part_is_not_there(tmp_path):
  def limit(size):
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, soft[1]))
    return soft[0]

  path = tmp_path / "metrics.jsonl"
  with Writer(tmp_path, start_step=0, tensorboard=False) as writer:
    writer.write(1, {"loss": 1.0}, "train")
    whole = {file: file.read_bytes() for file in (path, path.with_suffix(".csv"))}
    before = limit(path.stat().st_size + 10)
    try:
      with pytest.raises(OSError, match="File too large") as raised:
        writer.write(2, {"loss": 2.0}, "train")
    finally:
      limit(before)
    assert raised.value.filename == str(path)
    assert {file: file.read_bytes() for file in whole} == whole
    writer.write(2, {"loss": 3.0}, "train")
  assert [record["loss"] for record in read(path)] == [1.0, 3.0]


def test_windows_are_means_that_end_at_multiples(tmp_path):
  path = tmp_path / "metrics.jsonl"
  with Writer(tmp_path, start_step=0, log_every=4, tensorboard=False) as writer:
    writer.log([1, 2, 3], {"loss": jnp.array([1.0, 2.0, 3.0])})
    writer.log([2], {"loss": np.array([7.0])}, "probe")
    assert read(path) == []
    writer.log([4, 5, 6], {"loss": np.array([6.0, 10.0, 11.0])})
    assert read(path) == [{"step": 4, "split": "train", "loss": 3.0}]
    writer.log([7, 8, 9], {"loss": np.array([1.0, 2.0, np.nan])})
    assert len(read(path)) == 2
  records = read(path)
  assert records[1] == {"step": 8, "split": "train", "loss": 6.0}
  assert records[2]["step"] == 9
  assert np.isnan(records[2]["loss"])
  assert records[3] == {"step": 2, "split": "probe", "loss": 7.0}
  assert len(records) == 4


def test_a_metric_of_some_steps_is_averaged_over_those(tmp_path):
  with Writer(tmp_path, start_step=0, log_every=2, tensorboard=False) as writer:
    writer.log([1], {"loss": np.array([1.0])})
    writer.log([2], {"loss": np.array([2.0]), "rate": np.array([0.5])})
  assert read(tmp_path / "metrics.jsonl") == [
    {"step": 2, "split": "train", "loss": 1.5, "rate": 0.5}
  ]


def test_resume_continues_as_if_there_had_been_no_break(tmp_path):
  def run(folder, first, last):
    with Writer(folder, start_step=first, log_every=2, tensorboard=False) as writer:
      for step in range(first + 1, last + 1):
        writer.log([step], {"loss": np.array([1.0 / step])})
        if step % 3 == 0:
          writer.write(step, {"accuracy": step / 10}, "validation")

  straight, broken = tmp_path / "straight", tmp_path / "broken"
  straight.mkdir()
  broken.mkdir()
  run(straight, 0, 12)
  run(broken, 0, 7)
  with (broken / "metrics.jsonl").open("ab") as file:
    file.write(b'{"step": 8, "split": "tr')
  assert read(broken / "metrics.jsonl")[-1]["step"] == 7
  run(broken, 4, 12)
  names = ["metrics.csv", "metrics.jsonl"]
  assert sorted(path.name for path in broken.iterdir()) == names
  for name in names:
    assert (broken / name).read_bytes() == (straight / name).read_bytes()


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 1, "split": "train"}\n{"step": 2, "split": "train"}')
  with Writer(tmp_path, start_step=2, tensorboard=False) as writer:
    writer.write(3, {"loss": 1.0}, "train")
  assert [record["step"] for record in read(path)] == [1, 2, 3]


def test_bad_values(tmp_path):
  with Writer(tmp_path, start_step=0, tensorboard=False) as writer:
    with pytest.raises(ValueError, match="must not be called 'step'"):
      writer.write(1, {"step": 1}, "train")
    with pytest.raises(ValueError, match=r"loss must be one number, got shape \(2,\)"):
      writer.write(1, {"loss": np.ones(2)}, "train")
    with pytest.raises(ValueError, match=r"each of the 2 steps, got shape \(2, 3\)"):
      writer.log([1, 2], {"loss": np.ones((2, 3))})
  assert read(tmp_path / "metrics.jsonl") == []
  with pytest.raises(ValueError, match="log_every must be at least 1, got 0"):
    Writer(tmp_path, start_step=0, log_every=0)


class Probe:
  """An array whose value is not there before ``ready``, as on a busy device."""

  def __init__(self, value):
    self.value, self.ready = value, False

  def __array__(self, dtype=None, copy=None):
    assert self.ready, "the host waited for a dispatch in progress"
    return np.asarray(self.value, dtype)


def test_delayed_never_asks_for_the_newest_dispatch():
  delayed = Delayed()
  probes = [Probe([float(i)]) for i in range(4)]
  taken = []
  for step, probe in enumerate(probes):
    taken += delayed.push([step], {"loss": probe})
    assert len(taken) == step
    probe.ready = True
  taken += delayed.flush()
  assert delayed.flush() == []
  assert [steps for steps, _ in taken] == [[0], [1], [2], [3]]
  assert [float(host["loss"][0]) for _, host in taken] == [0.0, 1.0, 2.0, 3.0]


def test_delayed_gives_host_arrays_of_device_values():
  delayed = Delayed()
  step = jax.jit(lambda x: {"loss": x * x, "norm": -x})
  for n in (1, 2):
    ready = delayed.push([n], step(jnp.array([float(n)])))
  [(steps, host)] = ready
  assert steps == [1]
  assert all(isinstance(value, np.ndarray) for value in host.values())
  assert {name: value.tolist() for name, value in host.items()} == {
    "loss": [1.0],
    "norm": [-1.0],
  }


def test_first_nonfinite():
  fine = np.array([1.0, 2.0, 3.0])
  late = np.array([1.0, 2.0, np.inf])
  early = np.array([1.0, -np.inf, np.nan])
  assert first_nonfinite([4, 5, 6], {"a": fine}) is None
  assert first_nonfinite([4, 5, 6], {"a": fine, "b": late}) == (6, "b")
  assert first_nonfinite([4, 5, 6], {"b": late, "c": early}) == (5, "c")
  assert first_nonfinite([4], {"n": np.array([3], np.int32)}) is None
  half = jnp.array([1, jnp.nan], jnp.bfloat16)
  assert first_nonfinite([1, 2], {"x": np.asarray(half)}) == (2, "x")


def events(folder):
  from tensorboardX.proto import event_pb2

  found = []
  for path in sorted(folder.glob("events.out.tfevents.*")):
    data, at, rows = path.read_bytes(), 0, []
    while at < len(data):
      # A record: length (8 bytes), its checksum (4), the event, its checksum (4).
      size = int.from_bytes(data[at : at + 8], "little")
      rows.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + size]))
      at += size + 16
    found.append(rows)
  return found


def scalars(rows):
  return [(e.step, v.tag, v.simple_value) for e in rows for v in e.summary.value]


def test_tensorboard_events_and_their_purge_on_resume(tmp_path):
  with Writer(tmp_path, start_step=0) as writer:
    writer.log([1, 2], {"loss": np.array([0.5, 0.25])})
  with Writer(tmp_path, start_step=1) as writer:
    writer.log([2], {"loss": np.array([0.125])})
    writer.write(2, {"accuracy": 1.0}, "validation")
  first, second = events(tmp_path)
  assert scalars(first) == [(1, "train/loss", 0.5), (2, "train/loss", 0.25)]
  assert scalars(second) == [(2, "train/loss", 0.125), (2, "validation/accuracy", 1.0)]
  # TensorBoard hides what earlier files say of steps from here on.
  starts = [e.step for e in second if e.HasField("session_log")]
  assert starts == [2]


LOOP = """
  import sys
  import numpy as np
  from gradlab.metrics import Writer, read
  path = sys.argv[1]
  start = int(sys.argv[2])
  writer = Writer(path, start_step=start, tensorboard=False)
  print("open", flush=True)
  step = start
  while True:
    step += 1
    writer.log([step], {"loss": np.array([step / 3]), "norm": np.array([np.inf])})
"""


def test_kill_leaves_whole_records(tmp_path):
  start, path = 0, tmp_path / "metrics.jsonl"
  for wait in (0.05, 0.1):
    process = subprocess.Popen(
      [sys.executable, "-c", textwrap.dedent(LOOP), str(tmp_path), str(start)],
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
      cwd=ROOT,
      stdout=subprocess.PIPE,
      text=True,
    )
    try:
      assert process.stdout.readline() == "open\n"
      with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=wait)
    finally:
      process.kill()
      process.communicate()
    records = read(path)
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    assert all(r["loss"] == r["step"] / 3 and r["norm"] == np.inf for r in records)
    rows = table(tmp_path)
    # Killed between the two writes of a record, the table lacks that one.
    assert 0 <= len(records) - len(rows) <= 1
    assert all(
      row == {name: str(value) for name, value in record.items()}
      for row, record in zip(rows, records, strict=False)
    )
    start = len(records) // 2
  assert start > 0
