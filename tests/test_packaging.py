"""What an install contains, and what works without one."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# An editable install of the checkout must not answer for what is tested.
NO_EDITABLE = (
  "import sys; sys.meta_path = [f for f in sys.meta_path "
  "if 'Editable' not in getattr(f, '__name__', '')]; "
)


def run(*command, cwd, **environment):
  done = subprocess.run(
    [str(part) for part in command],
    cwd=cwd,
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The wheel built from the sdist of a clean copy of the tracked files."""
  folder = tmp_path_factory.mktemp("package")
  listed = run(
    "git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT
  )
  for name in filter(None, listed.split("\0")):
    source, target = ROOT / name, folder / "source" / name
    if not source.exists():
      continue
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
      target.symlink_to(os.readlink(source))
    else:
      target.write_bytes(source.read_bytes())
  # without --wheel or --sdist, build makes the sdist and the wheel from that sdist
  run(sys.executable, "-m", "build", "--outdir", folder, cwd=folder / "source")
  return next(folder.glob("*.whl"))


def test_wheel_has_one_top_level_name(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  tops = {name.split("/")[0] for name in names}
  assert {top for top in tops if not top.endswith(".dist-info")} == {"gradlab"}
  tracked = [p for p in (ROOT / "transforms").rglob("*.py")]
  for path in tracked:
    assert f"gradlab/{path.relative_to(ROOT).as_posix()}" in names
  assert "gradlab/experiments/digits.py" in names


def test_wheel_imports_outside_the_checkout(wheel, tmp_path):
  site = tmp_path / "site"
  install = ("-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel)
  run(sys.executable, *install, cwd=tmp_path)
  code = NO_EDITABLE + (
    "import gradlab.transforms as t, gradlab.launch.train; "
    "print(t.__file__); t.updates.adan; t.adan"
  )
  said = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
  assert str(site) in said


def test_program_runs_from_the_checkout_with_only_the_dependencies(tmp_path):
  code = NO_EDITABLE + (
    "sys.argv = ['train', "
    f"'--config=experiments/digits.py', '--workdir={tmp_path / 'run'}', "
    "'--config.stages.train.steps=20']; "
    "from gradlab.launch import train; train.run()"
  )
  said = run(sys.executable, "-c", code, cwd=ROOT)
  assert f"run folder: {tmp_path / 'run'}" in said
