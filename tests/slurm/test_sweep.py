"""A sweep on a real Slurm whose launcher is killed and whose jobs are disturbed."""

import json
import subprocess
import sys
from pathlib import Path

from tests.launch import programs, runs
from tests.slurm import cluster
from tests.slurm.looks import alive, ids, starts

TRAIN = runs.CONFIG["stages"]["train"]
CONFIG = {
  **runs.CONFIG,
  "stages": {
    "train": {**TRAIN, "steps": 20_000, "eval_every": 5000},
    "test": runs.CONFIG["stages"]["test"],
  },
}
# Arms of which each has the numbers of the others.
SWEEP = """

def sweep_every():
  from gradlab import sweeps

  return sweeps.choices("stages.train.checkpoint_every", range(1000, 1006))
"""
# What happens to an arm once it has a checkpoint.
DISTURB = {
  1000: ["scancel {}"],
  1001: ["scontrol update JobId={} Requeue=0", "scancel {}"],
  1002: ["scontrol requeue {}"],
  1003: ["scancel --signal=USR2 {}.0"],
  1004: ["scancel --signal=TERM {}.0"],
  1005: [],
}


def launch(file: Path, folder: Path) -> subprocess.Popen[str]:
  return subprocess.Popen(
    [
      *(sys.executable, "-m", "gradlab.launch.sweep"),
      *(f"--config={file}", f"--workdir={folder}", "--sweep=every", "--vmap=never"),
      *(
        "--executor=slurm",
        "--max_parallel=2",
        "--slurm=time=20,cpus_per_task=1,mem=1GB",
      ),
    ],
    cwd=programs.ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def has_checkpoint(arm: Path) -> bool:
  return any(path.name.isdigit() for path in arm.glob("checkpoints/train/*"))


def test_disturbed_jobs_end_with_the_numbers_of_an_undisturbed_one(
  tmp_path: Path,
) -> None:
  file = programs.write_config(tmp_path / "config.py", CONFIG)
  file.write_text(file.read_text() + SWEEP)
  folder = tmp_path / "sweep"
  arms = {every: folder / f"arms/checkpoint_every={every}" for every in DISTURB}
  with launch(file, folder) as killed:
    try:
      cluster.wait("a start", lambda: any(map(Path.exists, arms.values())))
    finally:
      killed.kill()
  known = dict(zip(DISTURB, ids(folder), strict=True))
  assert alive(folder) == list(known.values())
  left = {every for every, commands in DISTURB.items() if commands}
  with launch(file, folder) as sweep:

    def ended() -> bool:
      for every in sorted(left):
        if has_checkpoint(arms[every]):
          for command in DISTURB[every]:
            cluster.run(*command.format(known[every]).split())
          assert not (arms[every] / "result.json").exists()
          left.remove(every)
      return sweep.poll() is not None

    try:
      cluster.wait("the end of the sweep", ended, 600.0)
    finally:
      sweep.terminate()
    assert sweep.stdout is not None
    assert sweep.stderr is not None
    out, err = sweep.stdout.read(), sweep.stderr.read()
  assert sweep.returncode == 0, err
  assert out.count("finished checkpoint_every=") == len(DISTURB)
  expected = runs.outcome(arms[1005])
  for every, arm in arms.items():
    assert runs.outcome(arm) == expected, every
    # the job that could not be requeued went on as another one
    assert starts(arm) == (1 if every in (1001, 1005) else 2), every
  assert err.count("queued again as") == 3
  assert len(ids(folder)) == len(DISTURB) + 1
  assert json.loads((arms[1001] / "result.json").read_text())["metrics"]
