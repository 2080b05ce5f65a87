"""What compressors share: how many entries a message carries."""

from typing import Any

from gradlab.transforms._common import check_range, concrete


def wire_size(size: int, fraction: Any, count: Any, *, names: tuple[str, str]) -> int:
  """Entries to send of a leaf of ``size``: ``count``, or a fraction of the size.

  Args:
    size: entries of the leaf.
    fraction: share of the entries in (0, 1]; the result is rounded, at least 1.
    count: takes the fraction's place when it is not None; at least 1.
    names: what the caller calls ``fraction`` and ``count``.

  Raises:
    ValueError: a value is traced, out of range, or a count is not whole.
  """
  name, value = (names[0], fraction) if count is None else (names[1], count)
  if value is None or not concrete(value):
    raise ValueError(
      f"{name} sets the message's shape, so it must be a Python number and cannot be "
      f"traced or swept in one compiled program, got {value!r}."
    )
  if count is not None:
    check_range(name, count, 1)
    if int(count) != count:
      raise ValueError(f"{name} must be a whole number, got {count!r}.")
    return int(count)
  check_range(name, fraction, 0, 1, open_low=True)
  return max(1, round(float(fraction) * size))
