"""metrics.csv: the same records as metrics.jsonl, as one table, whatever happened."""

import csv

import numpy as np
import pytest

from gradlab.metrics import Writer, read


def table(folder):
  with (folder / "metrics.csv").open(newline="") as file:
    return list(csv.DictReader(file))


def test_the_table_has_a_row_per_record_and_grows_by_columns(tmp_path):
  path = tmp_path / "metrics.csv"
  with Writer(tmp_path, start_step=0, tensorboard=False) as writer:
    assert path.read_bytes() == b"step,split\r\n"
    writer.write(1, {"loss": 0.1}, "train")
    node = path.stat().st_ino
    writer.write(2, {"loss": np.nan}, "train")
    assert path.stat().st_ino == node
    writer.write(2, {"accuracy": np.float32(0.1), 'say "a,b"': 3}, "validation")
    node = path.stat().st_ino
    writer.write(3, {"loss": -np.inf}, "train")
    assert path.stat().st_ino == node
  assert path.read_bytes().split(b"\r\n") == [
    b'step,split,loss,accuracy,"say ""a,b"""',
    b"1,train,0.1,,",
    b"2,train,nan,,",
    b"2,validation,,0.10000000149011612,3",
    b"3,train,-inf,,",
    b"",
  ]
  rows = [
    {n: row[n] for n in record}
    for row, record in zip(
      table(tmp_path), read(tmp_path / "metrics.jsonl"), strict=True
    )
  ]
  assert rows == [
    {name: str(value) for name, value in record.items()}
    for record in read(tmp_path / "metrics.jsonl")
  ]


def remove(path):
  path.unlink()


def tear(path):
  path.write_bytes(path.read_bytes()[:-4])


def disagree(path):
  path.write_bytes(path.read_bytes().replace(b"0.5", b"0.75"))


@pytest.mark.parametrize("damage", [remove, tear, disagree, lambda path: None])
def test_the_table_is_made_again_to_agree_with_the_records(tmp_path, damage):
  def run(folder, first, last):
    with Writer(folder, start_step=first, tensorboard=False) as writer:
      for step in range(first + 1, last + 1):
        writer.write(step, {"loss": 1 / step}, "train")
        if step == 3:
          writer.write(step, {"accuracy": 0.25}, "validation")

  straight, broken = tmp_path / "straight", tmp_path / "broken"
  for folder in (straight, broken):
    folder.mkdir()
  run(straight, 0, 6)
  run(broken, 0, 4)
  damage(broken / "metrics.csv")
  # step 3 is not yet there again: its metric makes the table wider once more
  run(broken, 2, 2)
  assert (broken / "metrics.csv").read_bytes().splitlines()[0] == b"step,split,loss"
  run(broken, 2, 6)
  for name in ("metrics.jsonl", "metrics.csv"):
    assert (broken / name).read_bytes() == (straight / name).read_bytes()
