"""The catalogue's listing, its page on one method, and the file that it writes."""

import io
import pathlib
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver
from rich.console import Console

import gradlab
from gradlab import catalog
from gradlab.launch import catalog as program
from gradlab.types import FAMILIES, ConfigError, Method

README = pathlib.Path(gradlab.__file__).parents[1] / "transforms" / "README.md"


def rule(x, *, eps=1e-8, other=print):
  r"""Does ``one`` thing to :func:`x`, |x| times.

  .. math:: y = x

  It is linear.

  .. math::
    z &= y \\
      &= x

  Args:
    x: an array, described on
      two lines.
    eps, other: more.

  Returns:
    Nothing.
  """
  del x, eps, other


RULE = Method("rule", "updates", rule, "Nobody, ``Nothing``, 1999", "1234.56789")


def _shown(print_to):
  console = Console(width=80, file=io.StringIO(), color_system=None)
  print_to(console)
  return console.file.getvalue()


@pytest.fixture
def parsed():
  """absl's flags as a started program has them, restored afterwards."""
  flags.FLAGS.mark_as_parsed()
  with flagsaver.flagsaver():
    yield flags.FLAGS


def test_readme_is_the_catalogue():
  assert README.read_text() == catalog.markdown(), (
    "run: python -m gradlab.launch.catalog --write=transforms/README.md"
  )


def test_readme_links_lead_to_files():
  text = catalog.markdown()
  for name, method in catalog.methods().items():
    link = f"{method.family}/{name}.py"
    assert f"[{name}]({link})" in text
    assert (README.parent / link).is_file()


def test_markdown_rows(monkeypatch):
  known = {**catalog.methods(), "rule": RULE}
  monkeypatch.setattr(catalog, "methods", lambda: known)
  assert (
    "| [rule](updates/rule.py) | Does `one` thing to `x`, \\|x\\| times. | Nobody, "
    "`Nothing`, 1999, [arXiv 1234.56789](https://arxiv.org/abs/1234.56789) |"
  ) in catalog.markdown().splitlines()


def test_parts_of_a_docstring():
  assert catalog.summary(RULE) == "Does ``one`` thing to :func:`x`, |x| times."
  assert catalog.equations(RULE) == "y = x\n\nz &= y \\\\\n  &= x"
  assert catalog.arguments(RULE) == {
    "x": "an array, described on two lines.",
    "eps": "more.",
    "other": "more.",
  }


@pytest.mark.parametrize("name", catalog.methods())
def test_every_method_can_be_shown(name):
  method = catalog.methods()[name]
  text = _shown(lambda console: program.show(method, console))
  assert text.startswith(f"{name} ({method.family})\n")
  assert all(len(line) <= 80 for line in text.splitlines())
  assert " 0x" not in text
  assert "``" not in text
  assert f"transforms/{method.family}/{name}.py" in text
  assert catalog.link(method) in text


def test_signature_has_defaults_and_no_annotations():
  assert program.signature(RULE) == "rule(x, *, eps=1e-08, other=print)"
  assert program.signature(catalog.methods()["squared_error"]) == (
    "squared_error(outputs, batch, *, label='label')"
  )


def test_listing_has_every_method_on_one_line_of_eighty_columns():
  text = _shown(lambda console: console.print(program.listing()))
  lines = [line.split() for line in text.splitlines() if line.strip()]
  for name, method in catalog.methods().items():
    [line] = [line for line in lines if line[0] == name]
    assert not method.arxiv or line[-1] == method.arxiv
  # the head, its rule, the families and the methods
  assert len(lines) == 2 + len(FAMILIES) + len(catalog.methods())


def test_experiments_are_found_by_quoted_name(tmp_path):
  (tmp_path / "uses.py").write_text('METHODS = ("adan", "adamw")')
  (tmp_path / "single.py").write_text("METHODS = ('adan',)")
  (tmp_path / "prose.py").write_text('"""About adan."""\nMETHODS = ("adan2",)')
  assert program.experiments("adan", tmp_path) == [
    "experiments/single.py",
    "experiments/uses.py",
  ]
  assert "experiments/digits_ablation.py" in program.experiments("adan")


def test_unknown_names():
  with pytest.raises(ConfigError, match=r"'adann'\. Did you mean 'adan'\?"):
    program.find("adann")
  with pytest.raises(ConfigError, match=r"'qqqq'\. Without a name all are listed\."):
    program.find("qqqq")


def test_write(tmp_path, parsed, capsys):
  parsed.write = str(tmp_path / "README.md")
  program.main(["catalog"])
  assert (tmp_path / "README.md").read_text() == catalog.markdown()
  assert "written" in capsys.readouterr().out
  parsed.write = str(tmp_path / "missing" / "README.md")
  with pytest.raises(ConfigError, match="No such file or directory"):
    program.main(["catalog"])


def test_into_a_pipe_it_is_one_line_per_method(parsed, capsys):
  program.main(["catalog"])
  lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
  assert [(line[0], line[1], line[3]) for line in lines] == [
    (m.family, m.name, m.arxiv) for m in catalog.methods().values()
  ]


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["adann"], "unknown method 'adann'. Did you mean 'adan'?"),
    (["adan", "adamw"], "flags: unexpected arguments adamw."),
  ],
)
def test_a_mistake_ends_the_program_with_one_line(arguments, said):
  done = subprocess.run(
    [sys.executable, "-m", "gradlab.launch.catalog", *arguments],
    cwd=README.parents[1],
    capture_output=True,
    text=True,
    check=False,
  )
  assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {said}\n")
