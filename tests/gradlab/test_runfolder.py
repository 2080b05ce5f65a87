"""The run folder: written once, recognised again, never half written."""

import json
import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

import gradlab
from gradlab import runfolder
from gradlab.types import ConfigError

CONFIG = {
  "steps": 20,
  "seed": 0,
  "stages": {"train": {"update": {"adan": {"betas": (0.9, 0.999), "clip": np.inf}}}},
  "none": None,
  "empty": {},
}


def contents(folder: Path) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_a_new_run_writes_its_three_files(tmp_path):
  folder = runfolder.open_run(tmp_path / "a" / "run", CONFIG, ["seed=0", "steps=20"])
  assert folder == tmp_path / "a" / "run"
  assert sorted(contents(folder)) == [
    "config.json",
    "environment.json",
    "overrides.txt",
  ]
  stored = json.loads((folder / "config.json").read_text())
  assert list(stored) == list(CONFIG)
  adan = stored["stages"]["train"]["update"]["adan"]
  assert adan == {"betas": [0.9, 0.999], "clip": "inf"}
  assert (folder / "overrides.txt").read_text() == "seed=0\nsteps=20\n"
  environment = json.loads((folder / "environment.json").read_text())
  assert environment["versions"]["gradlab"] == gradlab.__version__
  assert environment["versions"]["jax"] == jax.__version__
  assert None not in environment["versions"].values()
  assert environment["backend"] == "cpu"
  assert sum(environment["devices"].values()) == jax.device_count()
  assert environment["command"]
  assert environment["hostname"]


def test_the_same_config_resumes(tmp_path):
  folder = runfolder.open_run(tmp_path, CONFIG, ["seed=0"])
  config = (folder / "config.json").read_bytes()
  first = json.loads((folder / "environment.json").read_text())
  # The order of the fields and 20 or 20.0 make no other run.
  same = {**dict(reversed(CONFIG.items())), "steps": 20.0}
  for _ in range(2):
    assert runfolder.open_run(tmp_path, same, []) == folder
  assert (folder / "config.json").read_bytes() == config
  environment = json.loads((folder / "environment.json").read_text())
  assert len(environment["earlier"]) == 2
  assert environment["earlier"][0] == first
  assert "earlier" not in environment["earlier"][1]


def test_another_config_is_refused_and_nothing_changes(tmp_path):
  runfolder.open_run(tmp_path, CONFIG, [])
  before = contents(tmp_path)
  other = json.loads(json.dumps({**CONFIG, "seed": True}))
  other["stages"]["train"]["update"]["adan"]["betas"] = [0.9, 0.99]
  other["new"] = 1
  del other["none"]
  with pytest.raises(ConfigError) as caught:
    runfolder.open_run(tmp_path, other, [])
  said = str(caught.value)
  assert f"{tmp_path} holds a run of another config: seed is 0 there and true here" in (
    said
  )
  assert (
    "stages.train.update.adan.betas is [0.9, 0.999] there and [0.9, 0.99] here" in said
  )
  assert "none is null there and absent here; new is absent there and 1 here" in said
  assert contents(tmp_path) == before


def test_many_differences_are_counted(tmp_path):
  runfolder.open_run(tmp_path, {str(i): i for i in range(9)}, [])
  with pytest.raises(ConfigError, match=r"3 is 3 there and 4 here; and 5 more fields"):
    runfolder.open_run(tmp_path, {str(i): i + 1 for i in range(9)}, [])


def test_without_resume_a_used_folder_is_refused(tmp_path):
  runfolder.open_run(tmp_path, CONFIG, [], resume=False)
  before = contents(tmp_path)
  with pytest.raises(ConfigError, match="already holds a run; choose another folder"):
    runfolder.open_run(tmp_path, CONFIG, [], resume=False)
  assert contents(tmp_path) == before


def test_folders_that_cannot_be_used(tmp_path):
  file = tmp_path / "file"
  file.write_text("mine")
  for folder in (file, file / "run", Path("/dev/null/run"), Path("/proc/gradlab")):
    with pytest.raises(ConfigError, match=f"run folder.*{folder.name}|{folder}.*run"):
      runfolder.open_run(folder, CONFIG, [])
  assert contents(tmp_path) == {"file": b"mine"}


def test_a_damaged_config_is_refused(tmp_path):
  (tmp_path / "config.json").write_text('{"steps": 2')
  with pytest.raises(ConfigError, match="is not valid JSON; restore or remove it"):
    runfolder.open_run(tmp_path, CONFIG, [])
  assert contents(tmp_path) == {"config.json": b'{"steps": 2'}


def test_a_config_that_json_cannot_hold_is_refused_before_anything_is_made(tmp_path):
  config = {"stages": {"train": {"losses": [len]}}}
  with pytest.raises(ConfigError, match=r"^stages.train.losses.0 must be a number"):
    runfolder.open_run(tmp_path / "run", config, [])
  assert list(tmp_path.iterdir()) == []


def test_write_json_keeps_the_old_file_until_the_new_one_is_whole(
  tmp_path, monkeypatch
):
  path = tmp_path / "x.json"
  runfolder.write_json(path, {"a": 1})

  def broken(file):
    raise OSError("no space left")

  with monkeypatch.context() as patch:
    patch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="no space left"):
      runfolder.write_json(path, {"a": 2})
  assert contents(tmp_path) == {"x.json": b'{\n  "a": 1\n}\n'}
  runfolder.write_json(path, {"b": (1, 2), "a": np.float32(0.5)})
  assert json.loads(path.read_text()) == {"b": [1, 2], "a": 0.5}
  assert list(json.loads(path.read_text())) == ["b", "a"]


def test_write_result(tmp_path):
  result = {"loss": jax.numpy.float32(0.25), "scores": np.arange(3), "worst": np.nan}
  runfolder.write_result(tmp_path, result)
  assert json.loads((tmp_path / "result.json").read_text()) == {
    "loss": 0.25,
    "scores": [0, 1, 2],
    "worst": "nan",
  }


def test_git_commit_is_that_of_the_checkout_which_tracks_the_package(tmp_path):
  def git(*arguments):
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(
      ["git", "-C", str(tmp_path), *author, *arguments], check=True, capture_output=True
    )

  package = tmp_path / "package"
  package.mkdir()
  (package / "__init__.py").write_text("")
  assert runfolder.git_commit(package) is None
  git("init")
  git("commit", "--allow-empty", "-m", "x")
  assert runfolder.git_commit(package) is None
  git("add", ".")
  git("commit", "-m", "y")
  commit = runfolder.git_commit(package)
  assert commit is not None
  assert len(commit) == 40
  (package / "__init__.py").write_text("1")
  assert runfolder.git_commit(package) == f"{commit}-dirty"


def test_git_may_be_missing(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  assert runfolder.git_commit(Path(gradlab.__file__).parent) is None
