"""The methods: ``python -m gradlab.launch.catalog [NAME] [--write=FILE]``.

Without a name it lists every method by family; into a pipe, as lines of family, name,
paper and arXiv number with tabs between them. With a name it shows the method: its
equations, its arguments with their defaults, its paper and the experiments that use it.
``--write`` writes the catalogue as Markdown.
"""

import inspect
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from absl import flags
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import gradlab
from gradlab import catalog, runfolder
from gradlab.launch import _main
from gradlab.types import ConfigError, Method

WRITE = flags.DEFINE_string("write", "", "The Markdown file to write.")
EXPERIMENTS = pathlib.Path(gradlab.__file__).parent / "experiments"


def find(name: str) -> Method:
  """The method of that name.

  Raises:
    ConfigError: there is none; the nearest name is in the message.
  """
  known = catalog.methods()
  if name not in known:
    near = catalog.nearest(name, tuple(known)) or " Without a name all are listed."
    raise ConfigError(f"unknown method {name!r}.{near}")
  return known[name]


def experiments(name: str, folder: pathlib.Path = EXPERIMENTS) -> list[str]:
  """The experiment files that name the method: it stands there between quotes."""
  quoted = re.compile(rf"""(["']){re.escape(name)}\1""")
  return [
    f"experiments/{path.name}"
    for path in sorted(folder.glob("*.py"))
    if quoted.search(path.read_text())
  ]


def signature(method: Method) -> str:
  """The call without annotations, for example ``rule(learning_rate, b1=0.9)``."""
  given = inspect.signature(method.factory)
  plain = [
    parameter.replace(
      annotation=parameter.empty,
      default=parameter.empty
      if parameter.default is parameter.empty
      else _Shown(_default(parameter.default)),
    )
    for parameter in given.parameters.values()
  ]
  bare = given.replace(parameters=plain, return_annotation=given.empty)
  return f"{method.name}{bare}"


def _default(value: Any) -> str:
  return value.__name__ if callable(value) else repr(value)


class _Shown(str):
  """A default in a signature, as it is to be read."""

  __slots__ = ()
  __repr__ = str.__str__


def listing() -> Table:
  """All methods, one line each, by family."""
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
  table.add_column("method", no_wrap=True)
  table.add_column("paper")
  table.add_column("arXiv", no_wrap=True)
  for family, members in catalog.families().items():
    table.add_row(Text(family, style="bold"))
    for member in members:
      paper = Text(member.paper, no_wrap=True, overflow="ellipsis")
      table.add_row(f"  {member.name}", paper, member.arxiv)
  return table


def _arguments(method: Method) -> Table:
  said = catalog.arguments(method)
  table = Table(box=None, pad_edge=False)
  table.add_column("argument", no_wrap=True)
  table.add_column("default", overflow="fold", max_width=20)
  table.add_column("meaning")
  for name, parameter in inspect.signature(method.factory).parameters.items():
    required = parameter.default is parameter.empty
    default = "" if required else _default(parameter.default)
    table.add_row(name, Text(default), Text(_plain(said.get(name, ""))))
  return table


def _plain(text: str) -> str:
  """reStructuredText without its marks."""
  return re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("``", "")


def show(method: Method, console: Console) -> None:
  """Prints one method."""

  def block(content: Any) -> None:
    console.print()
    console.print(Padding.indent(content, 2))

  console.print(Text.assemble((method.name, "bold"), f" ({method.family})"))
  console.print(Text(_plain(catalog.summary(method))))
  block(Text(signature(method)))
  if catalog.equations(method):
    block(Text(catalog.equations(method)))
  if inspect.signature(method.factory).parameters:
    block(_arguments(method))
  facts = Table.grid(padding=(0, 2))
  facts.add_row("paper", Text(method.paper))
  if catalog.link(method):
    facts.add_row("", catalog.link(method))
  facts.add_row("file", f"transforms/{method.family}/{method.name}.py")
  facts.add_row("used in", "\n".join(experiments(method.name)) or "no experiment")
  console.print()
  console.print(facts)


def main(argv: Sequence[str]) -> None:
  """Lists the methods, shows one, or writes the catalogue."""
  console = Console(highlight=False)
  if argv[1:]:
    show(find(argv[1]), console)
  elif WRITE.value:
    try:
      runfolder.write_atomic(WRITE.value, catalog.markdown())
    except OSError as error:
      raise ConfigError(f"--write: {WRITE.value}: {error.strerror}.") from error
    console.print(f"written: {WRITE.value}", soft_wrap=True)
  elif console.is_terminal:
    console.print(listing())
  else:
    for method in catalog.methods().values():
      print(method.family, method.name, method.paper, method.arxiv, sep="\t")


def run() -> None:
  """The console entry point."""
  _main.run(main, arguments=1)


if __name__ == "__main__":
  run()
