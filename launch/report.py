"""Shows runs: ``python -m gradlab.launch.report --workdir=DIR [--metric=STAGE/NAME]``.

DIR is the folder of a run or of a sweep, or one whose direct children are runs. It
gets a folder ``report``: ``report.html`` is one file that needs nothing else, and
beside it are the same figures as PNG and the tables as CSV and Markdown. Runs that
failed, are not finished or wait are shown as such.
"""

import pathlib
from collections.abc import Callable, Sequence

from absl import flags
from rich.console import Console

from gradlab import runfolder
from gradlab.launch import _main
from gradlab.launch._report import page, png
from gradlab.launch._report import summary as report_summary
from gradlab.launch._report import tables as report_tables
from gradlab.types import ConfigError

FILES = (
  "report.html",
  "curves.png",
  "settings.png",
  "heatmap.png",
  "parallel.png",
  "table.csv",
  "settings.csv",
  "table.md",
)


def write(
  folder: pathlib.Path,
  *,
  title: str | None = None,
  metric: str = "",
  console: Console | None = None,
) -> list[pathlib.Path]:
  """Writes the report of a run or a sweep into its folder ``report``.

  Args:
    folder: of the run or the sweep.
    title: the report's; None names the config file.
    metric: the main one, "stage/name"; "" takes the last stage's accuracy or loss.
    console: where the table of settings is printed; None prints nothing.

  Returns:
    The files, ``report.html`` first.

  Raises:
    ConfigError: a folder without runs or that cannot be written, or an unknown metric.
  """
  summary = report_summary.summarise(folder, title, metric)
  written = _write(summary)
  if console is not None:
    console.print(report_tables.terminal(summary))
  return written


def _write(summary: report_summary.Summary) -> list[pathlib.Path]:
  writers: dict[str, Callable[[report_summary.Summary], str | bytes]] = {
    "report.html": page.page,
    **png.drawings(summary),
    "table.csv": report_tables.arms_csv,
    "settings.csv": report_tables.settings_csv,
    "table.md": report_tables.markdown,
  }
  target = summary.sweep.folder / "report"
  made = {name: make(summary) for name, make in writers.items()}
  try:
    target.mkdir(exist_ok=True)
    for name, content in made.items():
      runfolder.write_atomic(target / name, content)
    for name in FILES:
      if name not in writers:
        (target / name).unlink(missing_ok=True)
  except OSError as error:
    raise ConfigError(
      f"--workdir: cannot write {target}: {error.strerror or error}."
    ) from error
  return [target / name for name in writers]


def main(argv: Sequence[str]) -> None:
  """Writes the report and prints its settings, best first, and its files."""
  del argv
  given = flags.FLAGS
  folder = pathlib.Path(given.workdir)
  console = Console(highlight=False)
  written = write(
    folder, title=given.title or None, metric=given.metric, console=console
  )
  for path in written:
    console.print(str(path), soft_wrap=True, markup=False)


def run() -> None:
  """The console entry point."""
  # Not at import: other programs that write a report have flags of these names.
  flags.DEFINE_string("workdir", "", "The folder of a run or of a sweep.")
  flags.DEFINE_string("metric", "", "What ranks the settings: stage/name.")
  flags.DEFINE_string("title", "", "The report's title.")
  _main.run(main, required=("workdir",))


if __name__ == "__main__":
  run()
