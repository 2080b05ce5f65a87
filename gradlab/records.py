"""Splits that live in ArrayRecord files, read at random access (extra ``data``)."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from gradlab.sources import Array, Dataset, Fields


class Records:
  """A split in an ArrayRecord file: ``[int] -> {field: array}``."""

  def __init__(self, path: str | os.PathLike[str]) -> None:
    """Opens a file that ``write_records`` wrote.

    Raises:
      ValueError: the file is missing, or ``array_record`` is not installed.
    """
    if not os.path.exists(path):
      raise ValueError(f"{os.fspath(path)!r} does not exist.")
    _check_installed()
    from grain.sources import ArrayRecordDataSource

    self._source = ArrayRecordDataSource(os.fspath(path))

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Fields:
    from flax import serialization

    record: Fields = serialization.msgpack_restore(self._source[index])
    return record


def write_records(
  path: str | os.PathLike[str], records: Iterable[Mapping[str, Array]]
) -> None:
  """Writes records of arrays (field -> array, the same fields in all) to one file.

  Raises:
    ValueError: ``array_record`` is not installed.
  """
  _check_installed()
  from array_record.python.array_record_module import ArrayRecordWriter
  from flax import serialization

  # one record per group: training reads single records in random order
  writer: Any = ArrayRecordWriter(os.fspath(path), "group_size:1")
  for record in records:
    writer.write(serialization.msgpack_serialize(dict(record)))
  writer.close()


def array_record(*, train: str, validation: str, test: str) -> Dataset:
  """Three ArrayRecord files as a data set; nothing is read before it is needed.

  Args:
    train: path of the training split.
    validation: path of the validation split.
    test: path of the test split.

  Raises:
    ValueError: a file is missing, or ``array_record`` is not installed.
  """
  splits = Records(train), Records(validation), Records(test)
  return Dataset(*splits, {"input_shape": splits[0][0]["inputs"].shape})


def _check_installed() -> None:
  try:
    import array_record.python  # noqa: F401
  except ImportError as error:
    raise ValueError("ArrayRecord files need `pip install gradlab[data]`.") from error
