"""Pieces of HTML: sections, tables and their cells."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from gradlab.launch._report.settings import Value, show

text = html.escape


def duration(seconds: float) -> str:
  """Seconds as they are spoken of: 12.3 s, 4 min 10 s, 3 h 05 min.

  Examples:
    >>> from gradlab.launch._report.html import duration
    >>> [duration(t) for t in (2.34, 119.7, 11100)]
    ['2.3 s', '2 min 00 s', '3 h 05 min']
  """
  if seconds < 99.95:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 100:
    return f"{minutes} min {rest:02d} s"
  hours, minutes = divmod(round(seconds / 60), 60)
  return f"{hours} h {minutes:02d} min"


def section(title: str, name: str, said: str, body: str) -> str:
  """A part of the page, with its title and a sentence about it."""
  lead = f'<p class="lead">{text(said)}</p>' if said else ""
  return f'<section id="{name}"><h2>{title}</h2>{lead}\n{body}</section>'


def table(
  heads: Sequence[tuple[str, bool]],
  body: str,
  kind: str,
  splits: Mapping[str, str] | None = None,
) -> str:
  """A table whose heads sort it.

  Args:
    heads: each column's name, and whether it is of numbers.
    body: the rows.
    kind: the table's class.
    splits: what stands below a head.
  """
  cells = ""
  for name, numeric in heads:
    split = (splits or {}).get(name, "")
    below = f"<small>{text(split)}</small>" if split else ""
    button = f'<button type="button">{text(name)}</button>{below}' if name else ""
    kept = ' class="number"' if numeric else ""
    cells += f'<th scope="col"{kept}>{button}</th>'
  return (
    f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{cells}</tr>'
    f"</thead><tbody>\n{body}</tbody></table></div>"
  )


def value(value: Value, numeric: bool) -> str:
  """A cell with a swept value, of a column of numbers or of others."""
  if numeric:
    return number(value, show(value))
  return f"<td>{text(show(value))}</td>"


def number(value: Any, said: str) -> str:
  """A cell that sorts by its number; one without a number comes last."""
  known = isinstance(value, int | float) and math.isfinite(value)
  return f'<td class="number" data-value="{value if known else ""}">{text(said)}</td>'
