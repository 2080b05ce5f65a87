"""Whatever a user gets wrong: exit code 2, one line on stderr, and no file touched."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.launch import programs, runs
from tests.launch.mistakes import CONFIG, Mistake, config
from tests.launch.mistakes_methods import ARGUMENTS, NAMES
from tests.launch.mistakes_stages import FITTING, FLAGS, PLACEMENT, STAGES

MISTAKES = NAMES + ARGUMENTS + STAGES + FITTING + PLACEMENT + FLAGS
# A server starts the others; these are started as a shell starts them.
FROM_A_SHELL = (
  "update",
  "missing argument of an edit",
  "field",
  "objective for other outputs",
  "few devices",
  "value of another type",
)


def files(folder: Path) -> dict[str, bytes | None]:
  """Every path below the folder; the content of files."""
  return {
    str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
    for path in folder.rglob("*")
  }


def assert_says(done: programs.Finished, says: str) -> None:
  """Exit code 2 and the one line, which has ``says``; nothing but it on stderr."""
  assert done.code == 2, done
  line, *others = done.err.splitlines()
  assert not others, done.err
  assert line.startswith("error: ")
  assert says in line


def call(folder: Path, mistake: Mistake) -> tuple[str, ...]:
  file = programs.write_config(folder / "config.py", config(mistake.changes))
  return f"--config={file}", f"--workdir={folder / 'run'}", *mistake.flags


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake(mistake: Mistake, tmp_path: Path, server: programs.Server) -> None:
  flags = call(tmp_path, mistake)
  before = files(tmp_path)
  assert_says(server.run(*flags, devices=8), mistake.says)
  assert files(tmp_path) == before


@pytest.mark.parametrize("name", FROM_A_SHELL)
def test_mistake_from_a_shell(name: str, tmp_path: Path) -> None:
  (mistake,) = (mistake for mistake in MISTAKES if mistake.name == name)
  flags = call(tmp_path, mistake)
  before = files(tmp_path)
  done = programs.run(*flags, devices=8)
  assert_says(done, mistake.says)
  assert files(tmp_path) == before


CONFIG_FILES = {
  "syntax": ("x = (\n", "SyntaxError: '(' was never closed"),
  "no get_config": ("x = 3\n", "config.py has no get_config()."),
  "name": ("def get_config():\n  return here\n", "config.py, line 2: NameError: "),
  "nothing": ("def get_config():\n  pass\n", "config.py returns a NoneType, not a "),
  "dots": (
    "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
    '  return ConfigDict({"optax.sgd": {}})\n',
    "config.py, line 5: ValueError: ConfigDict does not accept dots in field names",
  ),
}


@pytest.mark.parametrize(("text", "says"), CONFIG_FILES.values(), ids=CONFIG_FILES)
def test_config_file(
  text: str, says: str, tmp_path: Path, server: programs.Server
) -> None:
  file = tmp_path / "config.py"
  file.write_text(text)
  done = server.run(f"--config={file}", f"--workdir={tmp_path / 'run'}")
  assert_says(done, "error: --config: ")
  assert_says(done, says)
  assert files(tmp_path) == {"config.py": text.encode()}


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    (("--workdir=w",), "flags: --config is missing."),
    (("--config=c.py", "--workdir=w"), "--config: there is no file 'c.py'."),
    (("--config=experiments/digits.py",), "flags: --workdir is missing."),
    (
      ("--config.seed=3", "--config=experiments/digits.py", "--workdir=w"),
      "flags: Found --config.seed=3 in argv before a value for --config was specified",
    ),
  ],
)
def test_flags_of_the_program(
  flags: tuple[str, ...], says: str, server: programs.Server
) -> None:
  assert_says(server.run(*flags), says)
  assert not (programs.ROOT / "w").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, server: programs.Server) -> Path:
  """A folder with ``config.py`` and its finished run in ``run``."""
  folder = tmp_path_factory.mktemp("finished")
  done = server.run(*call(folder, SAVING))
  assert (done.code, done.err) == (0, ""), done
  return folder


SAVING = Mistake("none", {"train.checkpoint_every": 2}, "")


def test_folder_of_another_config(
  finished: Path, tmp_path: Path, server: programs.Server
) -> None:
  before = files(finished)
  changes = {**SAVING.changes, "train.steps": 5, "train.update.adamw.b1": 0.8}
  file = programs.write_config(tmp_path / "config.py", config(changes))
  done = server.run(f"--config={file}", f"--workdir={finished / 'run'}")
  assert_says(
    done,
    f"{finished / 'run'} holds a run of another config: stages.train.steps is 4 there "
    "and 5 here; stages.train.update.adamw.b1 is absent there and 0.8 here.",
  )
  assert files(finished) == before


def test_folder_of_a_run_that_is_not_to_be_resumed(
  finished: Path, server: programs.Server
) -> None:
  before = files(finished)
  flags = f"--config={finished / 'config.py'}", f"--workdir={finished / 'run'}"
  assert_says(
    server.run(*flags, "--noresume"),
    f"{finished / 'run'} already holds a run; choose another folder.",
  )
  assert files(finished) == before


# Permissions do not bind root, who may run the tests: a path below a file and one in
# /proc can be written by nobody.
@pytest.mark.parametrize(
  ("name", "says"),
  [
    ("file", "cannot use {} as a run folder: Not a directory."),
    ("file/run", "cannot use {} as a run folder: Not a directory."),
    ("/proc/run", "cannot write the run folder {}: No such file or directory."),
  ],
)
def test_folder_that_cannot_be_made(
  name: str, says: str, tmp_path: Path, server: programs.Server
) -> None:
  file = programs.write_config(tmp_path / "config.py", CONFIG)
  (tmp_path / "file").write_text("kept")
  before = files(tmp_path)
  done = server.run(f"--config={file}", f"--workdir={tmp_path / name}")
  assert_says(done, says.format(tmp_path / name))
  assert files(tmp_path) == before


def test_folder_with_a_damaged_config(
  finished: Path, tmp_path: Path, server: programs.Server
) -> None:
  shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
  (tmp_path / "run" / "config.json").write_text('{"seed": ')
  before = files(tmp_path)
  flags = f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"
  assert_says(
    server.run(*flags), "config.json is not valid JSON; restore or remove it."
  )
  assert files(tmp_path) == before


def test_every_checkpoint_is_damaged(
  finished: Path, tmp_path: Path, server: programs.Server
) -> None:
  shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
  folder = tmp_path / "run" / "checkpoints" / "train"
  assert sorted(path.name for path in folder.iterdir()) == ["2", "4"]
  for checkpoint in folder.iterdir():
    largest = runs.largest_file(checkpoint)
    largest.write_bytes(largest.read_bytes()[:-1])
  before = files(tmp_path)
  flags = f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"
  done = server.run(*flags)
  *warnings, error = done.err.splitlines()
  assert done.code == 2
  assert error == f"error: every checkpoint in {folder} is damaged; the log says how."
  for step, warning in zip((4, 2), warnings, strict=True):
    assert f"checkpoint {folder / str(step)} is damaged and passed over: " in warning
  assert files(tmp_path) == before


def test_checkpoint_of_another_state(
  finished: Path, tmp_path: Path, server: programs.Server
) -> None:
  changed: dict[str, Any] = copy.deepcopy(config(SAVING.changes))
  changed["model"]["features"] = (4,)
  file = programs.write_config(tmp_path / "config.py", changed)
  folder = tmp_path / "run" / "checkpoints" / "train"
  shutil.copytree(finished / "run" / "checkpoints" / "train", folder)
  before = files(tmp_path)
  done = server.run(f"--config={file}", f"--workdir={tmp_path / 'run'}")
  assert_says(done, f"checkpoint {folder / '4'} is one of another state: 9 leaves")
  assert_says(done, "float32[8,10] there and float32[4,10] here.")
  assert files(tmp_path) == before
