"""The catalogue: every method by name, with its family, paper and factory."""

import difflib
import importlib
import inspect
import re

from gradlab.types import FAMILIES, REGISTRY, Method
from gradlab.types import method as method


def methods() -> dict[str, Method]:
  """All registered methods, name -> ``Method``, sorted by family and name."""
  importlib.import_module("gradlab.transforms")
  return dict(sorted(REGISTRY.items(), key=lambda item: (item[1].family, item[0])))


def families() -> dict[str, list[Method]]:
  """Family -> its methods by name, the families in the order of ``FAMILIES``."""
  known = methods().values()
  return {name: [m for m in known if m.family == name] for name in FAMILIES}


def nearest(name: str, names: "list[str] | tuple[str, ...]") -> str:
  """' Did you mean ...?' for a misspelt name, or '' when nothing is near."""
  close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
  return f" Did you mean {close[0]!r}?" if close else ""


def summary(method: Method) -> str:
  """The first line of the method's docstring.

  Examples:
    >>> from gradlab.catalog import methods, summary
    >>> summary(methods()["mezo"]).endswith(".")
    True
  """
  return (inspect.getdoc(method.factory) or "").partition("\n")[0]


def equations(method: Method) -> str:
  """The LaTeX of the docstring's ``.. math::`` blocks, a blank line between them.

  Examples:
    >>> from gradlab.catalog import equations, methods
    >>> print(equations(methods()["squared_error"]))
    L = \\frac{1}{N} \\sum_{n} (o_n - y_n)^2
  """
  text = inspect.getdoc(method.factory) or ""
  blocks = re.findall(r"^\.\. math::(.*\n(?:(?:  .*)?\n)*)", text + "\n", re.M)
  return "\n\n".join(inspect.cleandoc(block) for block in blocks)


def arguments(method: Method) -> dict[str, str]:
  """Name -> what the docstring's ``Args:`` says of it, on one line.

  Examples:
    >>> from gradlab.catalog import arguments, methods
    >>> arguments(methods()["squared_error"])["label"]
    "the name of the targets' field."
  """
  text = inspect.getdoc(method.factory) or ""
  section = re.search(r"^Args:\n((?:(?:  .*)?\n)+)", text + "\n", re.M)
  entries = re.findall(
    r"^  (\w+(?:, \w+)*): (.*(?:\n(?:    .*)?)*)", section[1] if section else "", re.M
  )
  return {
    name: " ".join(said.split())
    for names, said in entries
    for name in names.split(", ")
  }


def link(method: Method) -> str:
  """The address of the method's paper, or "" when it is not on arXiv."""
  return f"https://arxiv.org/abs/{method.arxiv}" if method.arxiv else ""


def markdown() -> str:
  """The catalogue as ``transforms/README.md`` holds it."""
  lines = [
    "# The methods",
    "",
    "Written by `python -m gradlab.launch.catalog --write=transforms/README.md`.",
    "`python -m gradlab.launch.catalog NAME` shows one method: its equations, its",
    "arguments and the experiments that use it.",
  ]
  for family, members in families().items():
    package = importlib.import_module(f"gradlab.transforms.{family}")
    lines += ["", f"## {family}", "", _plain(package.__doc__ or ""), ""]
    lines += ["| method | what it is | paper |", "| --- | --- | --- |"]
    for member in members:
      paper = _plain(member.paper)
      if member.arxiv:
        paper += f", [arXiv {member.arxiv}]({link(member)})"
      file = f"[{member.name}]({family}/{member.name}.py)"
      lines.append(f"| {file} | {_plain(summary(member))} | {paper} |")
  return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
  """One line of reStructuredText as Markdown that a table can hold."""
  text = re.sub(r":math:`([^`]*)`", r"$\1$", " ".join(text.split()))
  text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", text)
  return text.replace("``", "`").replace("|", r"\|")
