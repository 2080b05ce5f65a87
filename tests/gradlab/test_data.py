import hashlib
import subprocess
import sys

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlab.data import (
  batches,
  eval_batches,
  index_block,
  indices,
  permutation,
  take,
)


def toy(n=10):
  rows = np.arange(n, dtype=np.int32)
  return {"inputs": np.stack([rows, -rows], 1).astype(np.float32), "label": rows}


class Records:
  """A random-access source: one record at a time."""

  def __init__(self, fields):
    self._fields = fields

  def __len__(self):
    return len(self._fields["label"])

  def __getitem__(self, index):
    return {name: values[index] for name, values in self._fields.items()}


def assert_same(left, right):
  assert set(left) == set(right)
  for name in left:
    assert left[name].dtype == right[name].dtype
    np.testing.assert_array_equal(left[name], right[name])


def test_order_is_pinned():
  assert indices(0, 0, 10, 4).tolist() == [0, 2, 9, 1]
  assert indices(0, 2, 10, 4).tolist() == [6, 7, 5, 3]
  assert indices(7, 123_456_789, 1000, 3).tolist() == [919, 915, 782]
  order = permutation(1, 2, 100_000)
  digest = hashlib.sha256(order.astype("<i4").tobytes()).hexdigest()
  assert digest == "25e1c7e8da053c01ba51f4e6c1230a1c8364296dce98a8b09d3e7f32dbda1296"


@settings(max_examples=20, deadline=None)
@given(
  seed=st.integers(0, 2**64 - 1),
  n=st.integers(1, 60),
  batch_size=st.integers(1, 60),
  start=st.integers(0, 10**9),
  num_steps=st.integers(1, 9),
)
def test_block_rows_are_the_steps(seed, n, batch_size, start, num_steps):
  batch_size = min(batch_size, n)
  block = index_block(seed, start, num_steps, n, batch_size)
  rows = [indices(seed, start + k, n, batch_size) for k in range(num_steps)]
  assert block.dtype == rows[0].dtype == np.int32
  np.testing.assert_array_equal(block, np.stack(rows))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 100), n=st.integers(1, 40), batch_size=st.integers(1, 40))
def test_every_epoch_holds_every_example_once(seed, n, batch_size):
  batch_size = min(batch_size, n)
  steps = -(-3 * n // batch_size)
  stream = index_block(seed, 0, steps, n, batch_size).ravel()
  for epoch in range(3):
    part = stream[epoch * n : (epoch + 1) * n]
    np.testing.assert_array_equal(np.sort(part), np.arange(n))
    np.testing.assert_array_equal(part, permutation(seed, epoch, n))


def test_batch_straddles_two_epochs():
  batch = indices(3, 1, 10, 7)
  first, second = permutation(3, 0, 10), permutation(3, 1, 10)
  assert batch.tolist() == [*first[7:], *second[:4]]


def test_epochs_and_seeds_have_orders_of_their_own():
  orders = [tuple(permutation(s, e, 50)) for s in range(4) for e in range(4)]
  assert len(set(orders)) == 16


def test_permutations_are_uniform():
  orders = np.array([permutation(0, epoch, 3) for epoch in range(3000)])
  _, counts = np.unique(orders, axis=0, return_counts=True)
  assert len(counts) == 6
  # 500 expected of each, standard deviation 20
  assert np.abs(counts - 500).max() < 100


def test_int32_steps_do_not_overflow():
  late = indices(0, np.int32(2**31 - 2), 1000, 512)
  assert late.tolist() == indices(0, 2**31 - 2, 1000, 512).tolist()
  epoch, offset = divmod((2**31 - 2) * 512, 1000)
  assert late[0] == permutation(0, epoch, 1000)[offset]


def test_orders_cannot_be_written_to():
  for rows in (indices(0, 0, 10, 4), indices(0, 2, 10, 4), indices(0, 1, 10, 7)):
    with pytest.raises(ValueError, match="read-only"):
      rows[0] = 5


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((0, 0, 5, 6), "between 1 and the number of examples 5, got 6"),
    ((0, 0, 5, 0), "got 0"),
    ((0, 0, 2**31, 1), r"at most 2\*\*31 - 1 examples"),
    ((-1, 0, 5, 2), "seed and step must be 0 or more"),
    ((0, -1, 5, 2), "seed and step must be 0 or more"),
  ],
)
def test_bad_orders(arguments, message):
  with pytest.raises(ValueError, match=message):
    indices(*arguments)


@pytest.mark.parametrize("make", [dict, Records])
def test_batches_are_the_rows_of_the_order(make):
  split = make(toy())
  ds = batches(split, batch_size=4, seed=2)
  for step in (0, 2, 7, 1_000_000, 2**31 - 2):
    rows = indices(2, step, 10, 4)
    assert_same(ds[step], {name: values[rows] for name, values in toy().items()})


def test_grain_source_serves_as_a_split():
  fields = toy()
  source = grain.MapDataset.source(
    [{name: values[k] for name, values in fields.items()} for k in range(10)]
  )
  assert_same(
    batches(source, batch_size=4, seed=2)[5], batches(fields, batch_size=4, seed=2)[5]
  )
  assert [b["mask"].sum() for b in eval_batches(source, 4)] == [4.0, 4.0, 2.0]


def test_one_step_after_another_equals_random_access():
  ds = batches(toy(), batch_size=4, seed=2)
  assert len(ds) == 2**31 - 1
  for start in (0, 3, 10**6):
    stream = iter(ds[start:].to_iter_dataset())
    for step in range(start, start + 6):
      assert_same(next(stream), ds[step])


def test_iterator_state_resumes_the_stream():
  ds = batches(toy(), batch_size=4, seed=2)
  stream = iter(ds.to_iter_dataset())
  for _ in range(5):
    next(stream)
  state = stream.get_state()
  resumed = iter(ds.to_iter_dataset())
  resumed.set_state(state)
  assert_same(next(resumed), ds[5])


@pytest.mark.parametrize("process_count", [1, 2, 3, 6])
def test_processes_share_the_global_batch(process_count):
  whole = batches(toy(), batch_size=6, seed=1)
  parts = [
    batches(toy(), batch_size=6, seed=1, process_index=p, process_count=process_count)
    for p in range(process_count)
  ]
  for step in (0, 1, 9):
    shards = [part[step] for part in parts]
    assert {len(s["label"]) for s in shards} == {6 // process_count}
    joined = {k: np.concatenate([s[k] for s in shards]) for k in shards[0]}
    assert_same(joined, whole[step])


def test_writing_to_a_batch_leaves_the_split_alone():
  split = toy()
  batches(split, batch_size=4, seed=0)[0]["inputs"][:] = 77.0
  assert_same(split, toy())


def test_rows_of_any_shape_are_taken():
  block = index_block(0, 0, 3, 10, 4)
  for split in (toy(), Records(toy())):
    taken = take(split, block)
    assert taken["inputs"].shape == (3, 4, 2)
    np.testing.assert_array_equal(taken["label"], block)


@pytest.mark.parametrize(
  ("split", "kwargs", "message"),
  [
    (toy(), {"batch_size": 11}, "number of examples 10, got 11"),
    (toy(), {"batch_size": 4, "process_count": 3}, "process_count = 3, got 4"),
    (toy(), {"batch_size": 4, "process_index": 1}, r"\[0, process_count = 1\), got 1"),
    ({**toy(), "label": np.arange(9)}, {"batch_size": 4}, "'inputs': 10, 'label': 9"),
    ({**toy(), "label": np.float32(1)}, {"batch_size": 4}, "'label': None"),
    ({}, {"batch_size": 1}, "one leading length"),
    (toy(0), {"batch_size": 1}, "at least one example"),
    (Records(toy(0)), {"batch_size": 1}, "at least one example"),
  ],
)
def test_bad_batches(split, kwargs, message):
  with pytest.raises(ValueError, match=message):
    batches(split, seed=0, **kwargs)


@pytest.mark.parametrize("make", [dict, Records])
@pytest.mark.parametrize(("batch_size", "count"), [(4, 3), (5, 2), (10, 1), (16, 1)])
def test_evaluation_sees_every_example_once(make, batch_size, count):
  seen = list(eval_batches(make(toy()), batch_size))
  assert len(seen) == count
  for batch in seen:
    assert batch["mask"].dtype == np.float32
    assert {len(values) for values in batch.values()} == {batch_size}
  kept = [batch["label"][batch["mask"] == 1] for batch in seen]
  assert np.concatenate(kept).tolist() == list(range(10))
  total = sum((batch["mask"] * batch["label"]).sum() for batch in seen)
  assert total == 45.0


def test_processes_share_evaluation():
  whole = list(eval_batches(toy(), 4))
  parts = [
    list(eval_batches(toy(), 4, process_index=p, process_count=2)) for p in (0, 1)
  ]
  for step, batch in enumerate(whole):
    joined = {k: np.concatenate([part[step][k] for part in parts]) for k in batch}
    assert_same(joined, batch)


@pytest.mark.parametrize(
  ("split", "kwargs", "message"),
  [
    ({"mask": np.ones(3)}, {"batch_size": 2}, "field named 'mask'"),
    (toy(), {"batch_size": 0}, "positive multiple"),
    (toy(), {"batch_size": 3, "process_count": 2}, "process_count = 2, got 3"),
    (toy(0), {"batch_size": 3}, "at least one example"),
  ],
)
def test_bad_evaluation(split, kwargs, message):
  with pytest.raises(ValueError, match=message):
    eval_batches(split, **kwargs)


def test_slow_libraries_are_imported_on_use():
  code = (
    "import sys, gradlab.data; print({'grain', 'sklearn', 'flax'} & set(sys.modules))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "set()"
