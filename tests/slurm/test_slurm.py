"""Jobs of a sweep on a real Slurm: lost, preempted, stopped and found again."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gradlab.launch._slurm.executor import TRIES, Slurm
from gradlab.launch._slurm.worker import Run
from gradlab.launch._sweep.executors import State
from gradlab.types import ConfigError
from tests.launch import programs
from tests.slurm import cluster, work
from tests.slurm.looks import alive, ids, read, starts
from tests.slurm.work import SETTINGS

ENDED = State("ended")


def executor(folder: Path, work: Run, say: Callable[[str], None] = print) -> Slurm:
  return Slurm(
    folder, max_parallel=2, settings=SETTINGS, run=work, seconds=0.5, say=say
  )


def finish(slurm: Slurm, seconds: float = 150.0) -> list[State]:
  """Polls until all jobs have ended."""

  def ended() -> bool:
    return all(state.phase == "ended" for state in slurm.poll())

  cluster.wait("the end of all jobs", ended, seconds)
  return slurm.poll()


def test_a_preempted_job_saves_and_goes_on_later(tmp_path: Path) -> None:
  slurm = executor(tmp_path, work.play)
  slurm.submit(work.waiting(tmp_path)[:1])
  (job,) = ids(tmp_path)
  arm = tmp_path / "arms/a"
  cluster.wait("the start", lambda: (arm / "starts").exists())
  output = f"--output={tmp_path}/urgent.out"
  urgent = ["--wait", "--partition=urgent", "--ntasks=2", output]
  cluster.run("sbatch", *urgent, "--wrap=squeue --noheader --format=%i/%T")
  # the urgent job had the node while the other one waited
  assert f"{job}/PENDING" in (tmp_path / "urgent.out").read_text().split()
  assert (arm / "saved").exists()
  (tmp_path / "go").touch()
  assert finish(slurm) == [ENDED]
  assert (arm / "starts").read_text().count("start") == starts(arm) == 2


def test_a_lost_job_is_given_up_in_the_end_and_one_that_raised_at_once(
  tmp_path: Path,
) -> None:
  said: list[str] = []
  slurm = executor(tmp_path, work.play, said.append)
  slurm.submit(work.jobs(tmp_path, killed="kill", raised="raise", sound="run"))
  killed, raised, sound = finish(slurm)
  assert killed.error is not None
  assert re.fullmatch(r"Slurm job \S+ ended as FAILED .*_0_log.err\)\.", killed.error)
  assert raised.error is not None
  assert "raised ValueError: no such thing (see " in raised.error
  assert sound == ENDED
  assert [len(text.split()) for text in read(tmp_path, "starts")] == [1 + TRIES, 1, 1]
  assert len(said) == TRIES
  assert all("(killed)" in sentence for sentence in said)


def test_stop_saves_what_runs_and_drops_what_waits(tmp_path: Path) -> None:
  slurm = executor(tmp_path, work.play)
  slurm.submit(work.waiting(tmp_path))
  cluster.wait("two runs", lambda: len(read(tmp_path, "starts")) == 2)
  phases = [state.phase for state in slurm.poll()]
  assert phases == ["running", "running", "waiting", "waiting"]
  slurm.stop()
  assert len(read(tmp_path, "saved")) == len(read(tmp_path, "starts")) == 2
  assert alive(tmp_path) == []
  again = executor(tmp_path, work.play)
  (tmp_path / "go").touch()
  again.submit(work.waiting(tmp_path))
  assert finish(again) == [ENDED] * 4


def test_a_killed_launcher_finds_its_jobs_again(tmp_path: Path) -> None:
  command = [sys.executable, "-m", "tests.slurm.work", str(tmp_path)]
  with subprocess.Popen(command, cwd=programs.ROOT) as launcher:
    try:
      cluster.wait("two runs", lambda: len(read(tmp_path, "starts")) == 2)
    finally:
      launcher.kill()
  before = alive(tmp_path)
  assert len(before) == 4
  # as if it had been killed before it could write the id
  path = tmp_path / "slurm/jobs.json"
  stored = json.loads(path.read_text())
  stored["submissions"][0]["id"] = None
  path.write_text(json.dumps(stored))
  slurm = executor(tmp_path, work.play)
  slurm.submit(work.waiting(tmp_path))
  assert alive(tmp_path) == before == ids(tmp_path)
  (tmp_path / "go").touch()
  assert finish(slurm) == [ENDED] * 4
  assert [text.split() for text in read(tmp_path, "starts")] == [["start"]] * 4


def test_jobs_that_are_grouped_otherwise_are_stopped_first(tmp_path: Path) -> None:
  executor(tmp_path, work.play).submit(work.waiting(tmp_path)[:2])
  cluster.wait("two runs", lambda: len(read(tmp_path, "starts")) == 2)
  (old,) = alive(tmp_path)[:1]
  slurm = executor(tmp_path, work.play)
  (job,) = work.jobs(tmp_path, b="wait")
  slurm.submit([job._replace(arms=("b", "e"), configs=("run", "run"))])
  assert len(read(tmp_path, "saved")) == 1
  assert old in alive(tmp_path)


def test_a_setting_that_slurm_refuses_is_one_sentence(tmp_path: Path) -> None:
  settings = {**SETTINGS, "partition": "nowhere"}
  slurm = Slurm(tmp_path, max_parallel=1, settings=settings, run=work.play)
  with pytest.raises(ConfigError, match="Invalid partition") as caught:
    slurm.submit(work.waiting(tmp_path))
  assert "\n" not in str(caught.value)
  assert ids(tmp_path) == []
