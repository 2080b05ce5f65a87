"""The parts of the page that are HTML: the header and the tables."""

import datetime
import json
from collections import Counter
from collections.abc import Iterable, Sequence

from gradlab.launch._report import config, html, statistics, tables
from gradlab.launch._report import figures as shapes
from gradlab.launch._report.load import STATUSES
from gradlab.launch._report.summary import Row, Summary, split_of

_MOST_VALUES = 12
_NARROW = 7
text = html.text


def header(summary: Summary) -> str:
  """The title and where the numbers come from."""
  arms = summary.sweep.arms
  environments = [arm.environment for arm in arms if arm.environment]
  counts = Counter(arm.status for arm in arms)
  status = ", ".join(f"{counts[name]} {name}" for name in STATUSES if counts[name])
  facts = {"runs" if not summary.sweep.single else "status": status}
  if summary.sweep.single:
    facts["status"] = arms[0].status
  facts["config"] = summary.sweep.config_file
  facts["sweep"] = ", ".join(summary.sweep.sweeps)
  starts = sorted(str(e["started"]) for e in environments if e.get("started"))
  facts["started"] = ", last ".join(dict.fromkeys(map(_when, starts[:1] + starts[-1:])))
  seconds = [arm.seconds for arm in arms if arm.seconds is not None]
  if seconds:
    facts["run time"] = html.duration(sum(seconds)) + (
      "" if summary.sweep.single else f" in all, {html.duration(max(seconds))} at most"
    )
  facts["devices"] = _same(
    ", ".join(f"{n} {kind}" for kind, n in e["devices"].items())
    for e in environments
    if isinstance(e.get("devices"), dict)
  )
  facts["commit"] = _same(
    str(e["commit"])[:12] for e in environments if e.get("commit")
  )
  facts["versions"] = _same(
    ", ".join(f"{name} {v}" for name, v in e["versions"].items() if v)
    for e in environments
    if isinstance(e.get("versions"), dict)
  )
  facts["folder"] = str(summary.sweep.folder.absolute())
  cells = "".join(
    f"<div><dt>{name}</dt><dd>{text(said)}</dd></div>"
    for name, said in facts.items()
    if said
  )
  notes = [*summary.sweep.notes]
  if summary.sweep.single:
    notes += [*filter(None, [arms[0].error]), *arms[0].notes]
  said = "".join(f'<p class="note">{text(note)}</p>' for note in notes)
  return f"<header><h1>{text(summary.title)}</h1>\n<dl>{cells}</dl>{said}</header>"


def _when(started: str) -> str:
  try:
    found = datetime.datetime.fromisoformat(started)
  except ValueError:
    return started
  return f"{found:%Y-%m-%d %H:%M} {found.tzname() or ''}".rstrip()


def _same(values: Iterable[str]) -> str:
  counts = Counter(values)
  if len(counts) < 2:
    return next(iter(counts), "")
  return "; ".join(f"{value} ({n} runs)" for value, n in counts.items())


def choice(summary: Summary) -> str:
  """The comparison of what validation chose."""
  rows = tables.choice(summary)
  if not rows:
    return ""
  split = _splits(summary)[summary.main]
  kinds = ", ".join(column.name for column in summary.columns if not column.numeric)
  said = (
    f"For each {kinds}, the setting with the best {summary.validation} (on the "
    f"validation split); {summary.main} ({split}) has no part in the choice."
  )
  return html.section("Chosen on validation", "chosen", said, _settings(summary, rows))


def settings(summary: Summary) -> str:
  """Every setting over its seeds; of a run, its final numbers."""
  if not summary.metrics:
    return ""
  splits = _splits(summary)
  if summary.sweep.single:
    body = "".join(
      f"<tr><td>{text(name)}</td><td>{text(splits[name])}</td>"
      f'<td class="number">{statistics.plus_minus(found)}</td></tr>'
      for name, found in summary.rows[0].estimates.items()
    )
    table = html.table(
      [("metric", False), ("split", False), ("value", True)], body, "final"
    )
    return html.section("Final numbers", "settings", "", table)
  return html.section(
    "Settings",
    "settings",
    tables.explanation(summary),
    _settings(summary, summary.rows),
  )


def _splits(summary: Summary) -> dict[str, str]:
  """Metric -> the split that it is measured on."""
  arms = summary.sweep.arms
  return {name: split_of(arms, name.partition("/")[0]) for name in summary.metrics}


def _settings(summary: Summary, rows: Sequence[Row]) -> str:
  heads = [(column.name, column.numeric) for column in summary.columns]
  heads += [("n", True), ("", False), *((name, True) for name in summary.metrics)]
  body = "".join(_row(summary, row) for row in tables.ranked(summary, rows))
  return html.table(heads, body, "settings", _splits(summary))


def _row(summary: Summary, row: Row) -> str:
  pairs = zip(summary.columns, row.setting.values, strict=True)
  cells = [html.value(value, column.numeric) for column, value in pairs]
  cells.append(html.number(row.finished, str(row.finished)))
  marks = "".join(
    f'<span class="mark {mark}">{mark}</span> ' for mark in tables.marks_of(row)
  )
  remark = row.remark(summary.main)
  cells.append(f"<td>{marks}<small>{text(remark)}</small></td>")
  for name in summary.metrics:
    found = row.estimates[name]
    cells.append(html.number(found.mean, statistics.plus_minus(found)))
  kind = ' class="best"' if row.best else ""
  return f"<tr{kind}>{''.join(cells)}</tr>\n"


def figures(summary: Summary) -> str:
  """Places for the figures of the main metric."""
  places = []
  heat = shapes.heat(summary)
  wide = heat is None or len(heat.x) > _NARROW
  for name, found, title in (
    ("response", shapes.response(summary), "by setting, with the 95% interval"),
    ("heat", heat, "mean over seeds"),
    ("parallel", shapes.parallel(summary), "a line per setting, coloured by its mean"),
  ):
    if found is not None:
      places.append(
        f"<figure{' class=wide' if wide else ''}><figcaption>"
        f"<b>{text(summary.main)}</b> {title}"
        f'<span class="clipped" id="{name}-clipped"></span></figcaption>'
        f'<div class="plot {name}" data-figure="{name}"></div></figure>'
      )
  if not places or len(summary.rows) < 2:
    return ""
  body = f'<div class="grid">{"".join(places)}</div>'
  return html.section("Effect of the settings", "effects", "", body)


def curves(summary: Summary) -> str:
  """Places for the learning curves, with their switches."""
  if not summary.panels:
    return ""
  switch = ""
  if any(panel.means for panel in summary.panels):
    switch = (
      '<div class="switch" role="group" aria-label="lines">'
      '<button type="button" data-mode="means" aria-pressed="true">Mean over seeds'
      '</button><button type="button" data-mode="arms" aria-pressed="false">Every run'
      "</button></div>"
    )
  legend = (
    f'<div class="legend" id="legend" role="group" aria-label="legend">'
    f'<span class="title">{text(summary.legend)}</span></div>'
  )
  panels = "".join(
    f"<figure><figcaption><b>{text(panel.metric)}</b> {text(panel.split)}"
    f'<button type="button" class="log" data-log="{i}" aria-pressed="false">log'
    f'</button></figcaption><div class="plot" data-figure="curve" data-panel="{i}">'
    "</div></figure>"
    for i, panel in enumerate(summary.panels)
  )
  body = f'<div class="controls">{switch}{legend}</div><div class="grid">{panels}</div>'
  said = ""
  if switch:
    said = "Bands are 95% intervals of the mean over seeds; failed runs are left out."
  return html.section("Learning curves", "curves", said, body)


def arms(summary: Summary) -> str:
  """Every arm, to sort and to filter."""
  if summary.sweep.single:
    return ""
  heads = [("run", False), *((c.name, c.numeric) for c in summary.columns)]
  seeded = any(seed is not None for seed in summary.seeds)
  heads += [("seed", True)] if seeded else []
  heads += [("status", False), *((name, True) for name in summary.metrics)]
  heads += [("seconds", True), ("remark", False)]
  body = []
  for i, arm in enumerate(summary.sweep.arms):
    name = text(arm.name)
    cells = [f'<td class="run" title="{name}">{name}</td>']
    cells += [html.value(c.values[i], c.numeric) for c in summary.columns]
    cells += [html.value(summary.seeds[i], True)] if seeded else []
    cells.append(f'<td><span class="status {arm.status}">{arm.status}</span></td>')
    for name in summary.metrics:
      value = arm.final.get(name)
      cells.append(html.number(value, "" if value is None else f"{value:.5g}"))
    said = "" if arm.seconds is None else f"{arm.seconds:.1f}"
    cells.append(html.number(arm.seconds, said))
    remark = " ".join([*filter(None, [arm.error]), *arm.notes])
    cells.append(f'<td class="remark">{text(remark)}</td>')
    body.append(f"<tr>{''.join(cells)}</tr>\n")
  bar = (
    '<div class="controls"><label>Filter <input type="search" id="filter" '
    'placeholder="words, or status=failed learning_rate&lt;0.01" '
    'autocomplete="off" spellcheck="false"></label>'
    '<output id="filtered" aria-live="polite"></output></div>'
  )
  table = html.table(heads, "".join(body), "arms", _splits(summary))
  return html.section("Runs", "runs", "", bar + table)


def configs(summary: Summary) -> str:
  """Where the configs differ, and all that they share."""
  known = [arm.config for arm in summary.sweep.arms if arm.config is not None]
  if not known:
    return ""
  rows = []
  for path, values in config.differing(known).items():
    shown = [json.dumps(value) for value in values[:_MOST_VALUES]]
    more = len(values) - len(shown)
    said = ", ".join(shown) + (f", and {more} more" if more > 0 else "")
    rows.append(
      f"<tr><td>{text(path)}</td>{html.number(len(values), str(len(values)))}"
      f'<td class="remark"><code>{text(said)}</code></td></tr>'
    )
  table = ""
  if rows:
    heads = [("field", False), ("values", True), ("", False)]
    table = html.table(heads, "".join(rows), "fields")
  common = text(json.dumps(config.shared(known), indent=2))
  name = "The config" if summary.sweep.single else "What all runs share"
  body = f"<details><summary>{name}</summary><pre>{common}</pre></details>"
  return html.section("Config", "config", "", table + body)
