"""What of the Slurm executor needs no Slurm; ``tests/slurm`` has the rest."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from gradlab.launch._slurm import jobs, queue
from gradlab.launch._slurm import settings as slurm_settings
from gradlab.launch._slurm.executor import Slurm
from gradlab.launch._slurm.jobs import Submission
from gradlab.launch._slurm.queue import Row
from gradlab.launch._sweep.executors import Job
from gradlab.types import ConfigError
from tests.launch import programs, runs

PROGRAMS = ("sbatch", "srun", "squeue", "scancel", "scontrol")
SQUEUE = "echo '12_0|RUNNING|gradlab-1'; echo '12_1|PENDING|gradlab-1'"


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
  """A folder with Slurm's commands, which note how they were called."""
  folder = tmp_path / "bin"
  folder.mkdir()
  for name in PROGRAMS:
    write(folder / name, ":")
  monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
  return folder


def write(file: Path, body: str) -> None:
  calls = file.parent / "calls"
  file.write_text(f'#!/bin/sh\necho "{file.name} $*" >> {calls}\n{body}\n')
  file.chmod(0o755)


@pytest.mark.parametrize(
  ("text", "settings"),
  [
    ("", {}),
    ("partition=gpu,time=90", {"partition": "gpu", "time": 90}),
    ("nodelist=a1,a2,mem=16GB", {"nodelist": "a1,a2", "mem": "16GB"}),
    (" gres=gpu:a100:1 , exclusive=true", {"gres": "gpu:a100:1", "exclusive": True}),
    ("constraint=a=b", {"constraint": "a=b"}),
  ],
)
def test_settings_are_read(text: str, settings: dict[str, object]) -> None:
  assert slurm_settings.parse_settings(text) == settings


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("partion=gpu", "--slurm has no 'partion'; did you mean 'partition'? Allowed:"),
    ("gpu", "--slurm must be name=value,..., got 'gpu'."),
    ("time=5,time=6", "--slurm has 'time' twice."),
    ("time=1:00:00", "'time' must be a whole number of minutes of at least 1"),
    ("time=0", "'time' must be a whole number of minutes of at least 1, got 0."),
    ("partition=", "--slurm's 'partition' has no value."),
    ("ntasks_per_node=2", "--slurm cannot set 'ntasks_per_node'"),
  ],
)
def test_a_bad_setting_is_one_sentence(text: str, said: str) -> None:
  with pytest.raises(ConfigError, match=re.escape(said)):
    slurm_settings.parse_settings(text)


def test_defaults_give_way_to_what_takes_their_place() -> None:
  assert slurm_settings.complete({"time": 5}) == {
    **slurm_settings.DEFAULTS,
    "time": 5,
  }
  given = slurm_settings.complete({"mem_per_cpu": "2GB"})
  assert "mem" not in given


def test_without_submitit_a_sentence_says_how_to_get_it(
  commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setitem(sys.modules, "submitit", None)
  with pytest.raises(ConfigError, match=r"pip install 'gradlab\[slurm\]'"):
    Slurm(tmp_path, max_parallel=1, settings={})


def test_without_slurm_the_program_says_so_and_writes_nothing(tmp_path: Path) -> None:
  file = programs.write_config(tmp_path / "config.py", runs.CONFIG)
  sweep = '\n\ndef sweep_seed():\n  return [{"seed": 2}]\n'
  file.write_text(file.read_text() + sweep)
  folder = tmp_path / "sweep"
  flags = [f"--config={file}", f"--workdir={folder}", "--sweep=seed"]
  done = programs.run(
    *(*flags, "--executor=slurm"), program="gradlab.launch.sweep", PATH=str(tmp_path)
  )
  assert done.code == 2
  assert done.err.startswith("error: executor: Slurm's sbatch is not on PATH")
  assert done.err.count("\n") == 1
  assert not folder.exists()


def test_the_queue_is_read_by_id(commands: Path) -> None:
  write(commands / "squeue", SQUEUE)
  assert queue.rows() == {
    "12_0": Row("gradlab-1", "RUNNING"),
    "12_1": Row("gradlab-1", "PENDING"),
  }
  write(commands / "squeue", "exit 1")
  assert queue.rows() is None


def test_a_queue_that_does_not_answer_ends_the_submission(
  commands: Path, tmp_path: Path
) -> None:
  write(commands / "squeue", "exit 1")
  slurm = Slurm(tmp_path, max_parallel=1, settings={})
  with pytest.raises(ConfigError, match="Slurm does not answer"):
    slurm.submit([Job("config.py", str(tmp_path), ("a",), ({},), vmapped=False)])
  assert "sbatch" not in (commands / "calls").read_text()


def test_what_waits_is_dropped_before_what_runs_is_asked_to_end(
  commands: Path,
) -> None:
  # the queue is empty once the running job was asked
  asked = f"grep -q TERM {commands / 'calls'} || {{ {SQUEUE}; }}"
  write(commands / "squeue", asked)
  queue.end(["12_0", "12_1"], patience=60.0)
  calls = (commands / "calls").read_text().splitlines()
  cancelled = [call for call in calls if call.startswith("scancel")]
  assert cancelled == ["scancel 12_1", "scancel --signal=TERM 12_0.0"]


def test_submissions_are_found_by_name_and_dropped_when_over(tmp_path: Path) -> None:
  lost = Submission("gradlab-1", None, (("a",), ("b",)))
  over = Submission("gradlab-2", "11", (("c",),))
  jobs.write(tmp_path, [lost, over])
  rows = {
    "12_0": Row("gradlab-1", "COMPLETED"),
    "12_1": Row("gradlab-1", "PENDING"),
    "11": Row("gradlab-2", "CANCELLED"),
  }
  (found,) = jobs.read(tmp_path, rows)
  assert found == lost._replace(id="12")
  assert jobs.alive(found, rows) == {"12_1": ("b",)}
  (tmp_path / "jobs.json").write_text(json.dumps({"submissions": [{}]}))
  with pytest.raises(ConfigError, match=r"jobs\.json is damaged"):
    jobs.read(tmp_path, rows)
