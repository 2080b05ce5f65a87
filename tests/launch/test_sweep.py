"""Sweeps as a user runs them: one program or several, killed, stopped, mistaken."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from gradlab.runfolder import status
from tests.launch import programs, swept
from tests.launch.swept import PROGRAM, flags
from tests.launch.test_bad_input import assert_says, files


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, server: programs.Server) -> Path:
  """A finished sweep of four arms in one program; long enough to be killed."""
  folder = tmp_path_factory.mktemp("whole")
  file = swept.write(folder, steps=4800)
  done = server.run(*flags(file, folder / "sweep", "rate,seed"), program=PROGRAM)
  assert (done.code, done.err) == (0, ""), done
  assert done.out.splitlines()[-1] == f"sweep folder: {folder / 'sweep'}"
  return folder / "sweep"


def test_each_arm_has_a_run_s_folder(whole: Path) -> None:
  names = [
    f"learning_rate={rate},seed={seed}" for rate in (0.001, 0.01) for seed in (0, 1)
  ]
  assert swept.statuses(whole) == dict.fromkeys(names, "finished")
  for name in names:
    arm = whole / "arms" / name
    found = {path.name for path in arm.iterdir() if "tfevents" not in path.name}
    assert found == {
      "checkpoints",
      "config.json",
      "environment.json",
      "metrics.csv",
      "metrics.jsonl",
      "metrics_open.json",
      "overrides.txt",
      "result.json",
    }
    assert [path.name for path in arm.glob("checkpoints/train/*")] == ["4800"]
    assert swept.read(arm / "result.json")["batch"]["arms"] == 4
  text = (whole / "arms" / names[2] / "overrides.txt").read_text()
  assert text == (
    "--config.stages.train.update.adamw.learning_rate=0.01\n--config.seed=0\n"
  )
  assert (whole / "report" / "report.html").stat().st_size > 0
  (log,) = (whole / "logs").iterdir()
  assert log.name.startswith("batch-")


def test_a_finished_sweep_runs_nothing(whole: Path, server: programs.Server) -> None:
  before = {p: p.stat().st_mtime_ns for p in whole.glob("arms/*/*") if p.is_file()}
  file = whole.parent / "swept.py"
  done = server.run(*flags(file, whole, "rate,seed"), program=PROGRAM)
  assert (done.code, done.err) == (0, ""), done
  assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_batch_that_is_killed_three_times(
  whole: Path, tmp_path: Path, server: programs.Server
) -> None:
  file, random = whole.parent / "swept.py", np.random.default_rng(0)
  asked = flags(file, tmp_path / "sweep", "rate,seed")
  for wanted in (0, 1000, 3000):
    running = server.start(*asked, program=PROGRAM, keep=False)
    swept.wait_for(tmp_path / "sweep", wanted, running)
    running.wait(random.uniform(0.0, 0.05 if wanted else 3.0))
    below = swept.descendants(running.pid)
    running.signal(signal.SIGKILL)
    assert running.finish().code == -signal.SIGKILL
    assert swept.gone(below)
    assert not list(tmp_path.glob("sweep/arms/*/result.json"))
  done = server.run(*asked, program=PROGRAM)
  assert (done.code, done.err) == (0, ""), done
  assert swept.outcome(tmp_path / "sweep") == swept.outcome(whole)


def test_a_sweep_that_is_asked_to_stop(
  whole: Path, tmp_path: Path, server: programs.Server
) -> None:
  file, folder = whole.parent / "swept.py", tmp_path / "sweep"
  running = server.start(*flags(file, folder, "rate,seed"), program=PROGRAM)
  swept.wait_for(folder, 50, running)
  running.signal(signal.SIGTERM)
  done = running.finish()
  assert (done.code, done.err) == (0, "")
  assert done.out.splitlines()[-1] == "stopped; the same command goes on."
  assert set(swept.statuses(folder).values()) == {"open"}
  assert list(folder.glob("batches/*/checkpoints/train/*"))
  # a batch that was begun stays one
  more = flags(file, folder, "rate,seed", "--vmap=never")
  done = server.run(*more, program=PROGRAM)
  assert (done.code, done.err) == (0, ""), done
  assert swept.outcome(folder) == swept.outcome(whole)


def test_a_worker_that_is_killed_takes_its_arm_only(
  tmp_path: Path, server: programs.Server
) -> None:
  file, folder = swept.write(tmp_path, steps=4800), tmp_path / "sweep"
  asked = flags(file, folder, "seed", "--vmap=never", "--max_parallel=2")
  running = server.start(*asked, program=PROGRAM)
  while not (folder / "arms" / "seed=0" / "metrics.jsonl").exists():
    assert not running.wait(0.02)
  worker = swept.worker_of(running.pid, folder / "logs" / "seed=0.log")
  os.kill(worker, signal.SIGKILL)
  done = running.finish()
  assert done.code == 1, done
  assert swept.statuses(folder) == {"seed=0": "failed", "seed=1": "finished"}
  error = swept.read(folder / "arms" / "seed=0" / "error.json")["error"]
  log = folder / "logs" / "seed=0.log"
  assert error == f"the process was ended by SIGKILL; {log} has its output."
  assert "1 of 2 arms failed; --retry_failed runs them again." in done.out

  assert server.run(*asked, program=PROGRAM).code == 1
  done = server.run(*asked, "--retry_failed", program=PROGRAM)
  assert (done.code, done.err) == (0, ""), done
  assert set(swept.statuses(folder).values()) == {"finished"}


@pytest.mark.parametrize("vmap", ["never", "auto"])
def test_an_arm_that_diverges_fails_alone(
  vmap: str, tmp_path: Path, server: programs.Server
) -> None:
  file, folder = swept.write(tmp_path), tmp_path / "sweep"
  done = server.run(
    *flags(file, folder, "diverging", f"--vmap={vmap}"), program=PROGRAM
  )
  assert (done.code, done.err) == (1, ""), done
  assert list(swept.statuses(folder).values()) == ["finished", "failed"]
  (failed,) = folder.glob("arms/*/error.json")
  assert "of stage 'train'" in swept.read(failed)["error"]
  assert swept.read(failed)["error"] in done.out


def test_arms_of_several_programs(tmp_path: Path, server: programs.Server) -> None:
  file = swept.write(tmp_path)
  one, other = tmp_path / "auto", tmp_path / "never"
  for folder, vmap in ((one, "auto"), (other, "never")):
    done = server.run(
      *flags(file, folder, "width,seed", f"--vmap={vmap}", "--max_parallel=2"),
      program=PROGRAM,
    )
    assert (done.code, done.err) == (0, ""), done
  sizes = {name: _batch(one, name) for name in swept.statuses(one)}
  assert set(sizes.values()) == {2}
  assert {_batch(other, name) for name in sizes} == {1}
  for name in sizes:
    losses = [
      swept.read(f / "arms" / name / "result.json")["metrics"]["test"]["loss"]
      for f in (one, other)
    ]
    # batched matrix products round differently
    np.testing.assert_allclose(*losses, rtol=1e-4)


def _batch(folder: Path, name: str) -> int:
  result = swept.read(folder / "arms" / name / "result.json")
  return int(result.get("batch", {"arms": 1})["arms"])


def test_a_sweep_can_be_extended(tmp_path: Path, server: programs.Server) -> None:
  file, folder = swept.write(tmp_path), tmp_path / "sweep"
  assert server.run(*flags(file, folder, "seed"), program=PROGRAM).code == 0
  before = (folder / "arms" / "seed=0" / "result.json").stat().st_mtime_ns
  assert server.run(*flags(file, folder, "rate,seed"), program=PROGRAM).code == 0
  assert set(swept.statuses(folder).values()) == {"finished"}
  assert len(swept.statuses(folder)) == 4
  assert (folder / "arms" / "seed=0" / "result.json").stat().st_mtime_ns == before


def test_a_second_sweep_on_a_folder(tmp_path: Path, server: programs.Server) -> None:
  file, folder = swept.write(tmp_path, steps=4800), tmp_path / "sweep"
  running = server.start(*flags(file, folder, "seed"), program=PROGRAM)
  swept.wait_for(folder, 1, running)
  done = server.run(*flags(file, folder, "seed"), program=PROGRAM)
  assert_says(done, f"--workdir: another sweep (process {running.pid} on ")
  assert_says(done, f"works on {folder}; wait for it, or choose another folder.")
  assert running.finish().code == 0
  assert set(swept.statuses(folder).values()) == {"finished"}


MISTAKES = {
  "unknown sweep": (
    "sede",
    "--sweep: unknown sweep 'sede'. Did you mean 'seed'? {file} has: rate, seed, ",
  ),
  "no such field": (
    "lost",
    "arm steps=1: stages.trian.steps: stages has no field 'trian'. Did you mean 'train",
  ),
  "no such argument": (
    "misspelt",
    "arm lerning_rate=0.001: stages.train.update.adamw.lerning_rate: unknown argument "
    "'lerning_rate'. Did you mean 'learning_rate'?",
  ),
  "bad value": ("bad_value", "arm learning_rate=-1: stages.train.update.adamw: "),
  "zero arms": ("nothing,seed", "--sweep: zero arms; nothing of {file} is empty."),
  "duplicate": ("twice", "--sweep: duplicate arms: seed=0 comes twice."),
  "the same": (
    "same",
    "--sweep: duplicate arms: base and seed=0 have the same config.",
  ),
  "no list": ("no_list", "sweep_no_list() of {file} must return a list of mappings"),
  "two of a field": ("seed,twice", "product: two of the sweeps set 'seed'."),
  "structure": (
    "width,seed --vmap=always",
    "--vmap=always: the arms differ in model.features; the arms of one program differ "
    "in seeds and float hyperparameters only.",
  ),
  "placement": ("replicas --vmap=always", "--vmap=always: parallel.mode: the arms of "),
  "parallel": ("seed --max_parallel=0", "--max_parallel=0: "),
  "executor": ("seed --executor=ray", "--executor=ray: value should be one of "),
  "workdir": ("seed --workdir=/proc/no", "--workdir: /proc/no: No such file"),
}


@pytest.mark.parametrize(("sweep", "says"), MISTAKES.values(), ids=MISTAKES)
def test_mistake(
  sweep: str,
  says: str,
  tmp_path: Path,
  server: programs.Server,
) -> None:
  file = swept.write(tmp_path)
  sweep, *more = sweep.split()
  before = files(tmp_path)
  done = server.run(*flags(file, tmp_path / "sweep", sweep, *more), program=PROGRAM)
  assert_says(done, says.format(file=file))
  assert files(tmp_path) == before


def test_slurm_that_is_not_installed(tmp_path: Path) -> None:
  file = swept.write(tmp_path)
  before = files(tmp_path)
  asked = flags(file, tmp_path / "sweep", "seed", "--executor=slurm")
  done = programs.run(*asked, program=PROGRAM, PATH=str(tmp_path))
  assert_says(done, "error: executor: ")
  assert_says(done, "sbatch")
  assert files(tmp_path) == before


def test_folder_of_another_sweep(whole: Path, server: programs.Server) -> None:
  before = files(whole)
  asked = flags(whole.parent / "swept.py", whole, "rate,seed", "--config.seed=3")
  changed = (*asked, "--config.stages.train.batch_size=4")
  done = server.run(*changed, program=PROGRAM)
  assert_says(
    done, "holds a run of another config: stages.train.batch_size is 8 there "
  )
  assert files(whole) == before
  assert {status(path) for path in (whole / "arms").iterdir()} == {"finished"}
