"""The report's figures as PNG, in the colours of the page on light ground."""

import functools
import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gradlab.launch._report import figures, style
from gradlab.launch._report.curves import Line, Panel
from gradlab.launch._report.settings import show
from gradlab.launch._report.summary import Summary

if TYPE_CHECKING:
  from matplotlib.figure import Figure

_DASHES: dict[str, Any] = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
_INK, _FAINT = "#3c434a", "#9aa2aa"
_MOST_PANELS = 8
_MOST_NUMBERS = 150
_MOST_TICKS = 8


def drawings(summary: Summary) -> dict[str, Callable[[Summary], bytes]]:
  """File name -> what draws it, for the figures that the summary has."""
  found: dict[str, Callable[[Summary], bytes]] = {}
  if summary.panels:
    found["curves.png"] = _curves
  response = figures.response(summary)
  heat, parallel = figures.heat(summary), figures.parallel(summary)
  if response:
    found["settings.png"] = functools.partial(_response, response)
  if heat:
    found["heatmap.png"] = functools.partial(_heat, heat)
  if parallel:
    found["parallel.png"] = functools.partial(_parallel, parallel)
  return found


def _figure(width: float, height: float) -> "Figure":
  # Imported here: a program's first step does not wait for matplotlib.
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), layout="constrained")


def _png(figure: "Figure") -> bytes:
  data = io.BytesIO()
  figure.savefig(data, format="png", dpi=130)
  return data.getvalue()


def _plain(axis: Any) -> None:
  axis.grid(alpha=0.25, linewidth=0.6)
  axis.spines[["top", "right"]].set_visible(False)
  axis.tick_params(colors=_INK, labelsize=8)
  for side in ("left", "bottom"):
    axis.spines[side].set_color(_FAINT)


def _curves(summary: Summary) -> bytes:
  panels = summary.panels[:_MOST_PANELS]
  columns = min(len(panels), 2)
  rows = math.ceil(len(panels) / columns)
  many = len(summary.groups) > 1
  figure = _figure(4.6 * columns + 1.8 * many, 2.9 * rows)
  axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
  for axis in axes[len(panels) :]:
    axis.set_axis_off()
  for axis, panel in zip(axes, panels, strict=False):
    _plain(axis)
    for line in panel.means or panel.arms:
      _line(axis, summary, line, bool(panel.means))
    axis.set_title(_title(panel), fontsize=10, loc="left", color=_INK)
    axis.set_xlabel("step", fontsize=8, color=_INK)
    if panel.log:
      axis.set_yscale("log")
  if many:
    from matplotlib.lines import Line2D

    handles = [
      Line2D([], [], color=g.light, linestyle=_DASHES[g.dash], label=g.label)
      for g in summary.groups
    ]
    figure.legend(
      handles=handles,
      title=summary.legend or None,
      loc="outside right upper",
      frameon=False,
      fontsize=7.5,
      title_fontsize=8,
      handlelength=2.4,
    )
  return _png(figure)


def _title(panel: Panel) -> str:
  return ", ".join(filter(None, (panel.metric, panel.split)))


def _line(axis: Any, summary: Summary, line: Line, bands: bool) -> None:
  group = summary.groups[line.group]
  axis.plot(
    line.steps,
    line.values,
    color=group.light,
    linestyle=_DASHES[group.dash],
    linewidth=1.5 if bands or len(summary.sweep.arms) <= style.MOST_GROUPS else 0.7,
    marker="o" if len(line.steps) == 1 else None,
    markersize=3,
  )
  alone = len(summary.groups) == len(summary.rows)
  if bands and alone and line.half is not None and np.isfinite(line.half).any():
    axis.fill_between(
      line.steps,
      line.values - line.half,
      line.values + line.half,
      color=group.light,
      alpha=0.12,
      linewidth=0,
    )


def _response(response: figures.Response, summary: Summary) -> bytes:
  figure = _figure(7.4, 3.8)
  axis = figure.subplots()
  _plain(axis)
  values = sorted({x for series in response.series for x in series.x})
  for number, series in enumerate(response.series):
    # Beside each other, so that no interval covers another.
    part = 0.007 * (number - (len(response.series) - 1) / 2)

    def shifted(x: float, part: float = part) -> float:
      if response.log:
        return x * (values[-1] / values[0]) ** part
      return x + part * (values[-1] - values[0])

    colours = [summary.groups[summary.group[i]].light for i in series.rows]
    single = len(response.series) == 1
    if not response.names:
      axis.plot(
        [shifted(x) for x in series.x],
        series.mean,
        color=_FAINT if single else colours[0],
        linewidth=1.4,
        label=series.label,
        zorder=1,
      )
    if series.dots:
      dots = [(shifted(x), value) for x, value in series.dots]
      axis.plot(*zip(*dots, strict=True), ".", color=_FAINT, ms=3, zorder=2)
    half = [h if math.isfinite(h) else 0.0 for h in series.half]
    for x, mean, h, colour in zip(series.x, series.mean, half, colours, strict=True):
      at = shifted(x)
      axis.errorbar(at, mean, yerr=h, color=colour, fmt="o", ms=4.5, lw=1.3, zorder=3)
  if response.log:
    axis.set_xscale("log")
  if response.names:
    axis.set_xticks(range(len(response.names)), response.names)
  elif len(values) <= _MOST_TICKS:
    axis.set_xticks(values, [show(value) for value in values])
    axis.minorticks_off()
  axis.set_xlabel(response.name, fontsize=9, color=_INK)
  axis.set_ylabel(summary.main, fontsize=9, color=_INK)
  if len(response.series) > 1 and not response.names:
    axis.legend(frameon=False, fontsize=8)
  return _png(figure)


def _heat(heat: figures.Heat, summary: Summary) -> bytes:
  low, high, _ = figures.limits(summary)
  means = np.asarray(
    [
      [
        math.nan if i is None else summary.rows[i].estimates[summary.main].mean
        for i in r
      ]
      for r in heat.rows
    ]
  )
  figure = _figure(min(2.6 + 0.75 * len(heat.x), 12), min(1.4 + 0.5 * len(heat.y), 10))
  axis = figure.subplots()
  scale = "viridis" if summary.higher else "viridis_r"
  drawn = axis.imshow(means, cmap=scale, vmin=low, vmax=high, aspect="auto")
  axis.set_xticks(range(len(heat.x)), heat.x, fontsize=8, color=_INK)
  axis.set_yticks(range(len(heat.y)), heat.y, fontsize=8, color=_INK)
  if len(heat.x) > 10:
    axis.tick_params(axis="x", rotation=45)
  axis.set_xlabel(heat.x_name, fontsize=9, color=_INK)
  axis.set_ylabel(heat.y_name, fontsize=9, color=_INK)
  axis.spines[:].set_visible(False)
  if means.size <= _MOST_NUMBERS:
    for (y, x), mean in np.ndenumerate(means):
      if math.isfinite(mean):
        light = (mean - low) / max(high - low, 1e-30) > 0.6
        colour = "black" if light == summary.higher else "white"
        axis.text(
          x, y, f"{mean:.3g}", ha="center", va="center", fontsize=7, color=colour
        )
  bar = figure.colorbar(drawn, ax=axis)
  bar.set_label(summary.main, fontsize=9, color=_INK)
  bar.outline.set_visible(False)
  bar.ax.tick_params(labelsize=8, colors=_INK)
  return _png(figure)


def _parallel(parallel: figures.Parallel, summary: Summary) -> bytes:
  figure = _figure(min(1.9 * len(parallel.axes) + 1, 14), 4.2)
  axis = figure.subplots()
  axis.set_axis_off()
  low, high, _ = figures.limits(summary)
  best = len(parallel.rows) - 1
  for number, (row, places) in enumerate(
    zip(parallel.rows, parallel.places, strict=True)
  ):
    mean = summary.rows[row].estimates[summary.main].mean
    colour = style.ramp(style.grade(mean, low, high, summary.higher))[0]
    axis.plot(
      range(len(places)),
      places,
      color=colour,
      linewidth=2.6 if number == best else 1.0,
      alpha=1.0 if number == best else 0.75,
    )
  for x, one in enumerate(parallel.axes):
    axis.axvline(x, color=_FAINT, linewidth=0.8, zorder=0)
    axis.text(x, 1.06, one.name, ha="center", va="bottom", fontsize=9, color=_INK)
    for y, text in one.ticks:
      axis.text(
        x + 0.03,
        y,
        text,
        fontsize=7.5,
        va="center",
        color=_INK,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
      )
  axis.set_xlim(-0.1, len(parallel.axes) - 0.6)
  return _png(figure)
