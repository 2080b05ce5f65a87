"""The report as one HTML file that asks nothing of any network."""

import json
from importlib import resources
from typing import Any

import gradlab
from gradlab.launch._report import data, sections
from gradlab.launch._report.summary import Summary

# Nothing may be fetched, whatever the scripts are asked to do.
_POLICY = (
  "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
  "img-src data: blob:"
)


def page(summary: Summary) -> str:
  """The whole page: tables as HTML, figures as data that plotly.js draws."""
  # Imported here: only a page needs it.
  from plotly.offline import get_plotlyjs

  parts = [
    sections.header(summary),
    sections.choice(summary),
    sections.settings(summary),
    sections.figures(summary),
    sections.curves(summary),
    sections.arms(summary),
    sections.configs(summary),
  ]
  scripts = "".join(
    f"<script>{_asset(f'report_{name}.js')}</script>\n"
    for name in ("tables", "figures", "effects", "page")
  )
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<meta name="color-scheme" content="light dark">\n'
    f'<meta name="generator" content="gradlab {gradlab.__version__}">\n'
    f"<title>{sections.text(summary.title)}</title>\n"
    f"<style>{_asset('report.css')}</style>\n</head>\n<body>\n<main>\n"
    + "\n".join(filter(None, parts))
    + "\n</main>\n"
    '<script type="application/json" id="data">'
    f"{_json(data.figures(summary))}</script>\n"
    # Inert until the tables are there: to read 5 MB of script takes a while.
    f'<script type="text/plain" id="plotly">{get_plotlyjs()}</script>\n'
    f"{scripts}</body>\n</html>\n"
  )


def _asset(name: str) -> str:
  return (
    resources.files("gradlab.launch._report")
    .joinpath("assets", name)
    .read_text("utf-8")
  )


def _json(value: Any) -> str:
  # "<" would let a name in the data end the script.
  found = json.dumps(value, allow_nan=False, separators=(",", ":"))
  return found.replace("<", "\\u003c")
