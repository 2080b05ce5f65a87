"""The report's page in a real browser: offline, sortable, with figures that answer."""

import numpy as np
import pytest

from gradlab.launch import report
from gradlab.launch._report import style
from tests.launch import browser as browsers
from tests.launch import report_folders as folders

UPDATE = "stages.train.update"
RATE = f"{UPDATE}.adamw.learning_rate"
RULES = {"adamw": 0.85, "adan": 0.95, "sinkgd": 0.9}
RATES = {0.005: 0.8, 0.02: 1.0, 0.08: 0.7}
SEEDS = 3


@pytest.fixture(scope="module")
def browser():
  with browsers.launched() as browser:
    yield browser


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
  """Three rules at three rates, three seeds each; one run failed."""
  arms = [
    (
      {UPDATE: {rule: {}}, f"{UPDATE}.{rule}.learning_rate": rate, "seed": seed},
      skill * part,
    )
    for rule, skill in RULES.items()
    for rate, part in RATES.items()
    for seed in range(SEEDS)
  ]
  folder = folders.write_sweep(tmp_path_factory.mktemp("page") / "sweep", arms)
  failed = folder / "arms" / "update=sinkgd,learning_rate=0.08,seed=2"
  (failed / "result.json").unlink()
  (failed / "error.json").write_text('{"error": "the loss </script> is not finite"}')
  return report.write(folder, title="Rules & rates <on> digits")[0]


@pytest.fixture(scope="module")
def opened(browser, page_file):
  """One page for all tests; each leaves the figures as they were."""
  with browsers.Opened(browser, page_file) as opened:
    yield opened


def scroll_to(opened, selector):
  opened.page.locator(selector).first.scroll_into_view_if_needed()


def head(opened, table, name):
  return opened.page.locator(f"table.{table} thead th", has_text=name).first


def drawn_lines(opened, panel):
  return opened.page.evaluate(
    "n => document.querySelector(`[data-panel='${n}']`)._fullData"
    ".filter(t => t.hoverinfo !== 'skip').map(t => t.name)",
    panel,
  )


def test_page_needs_no_network_and_has_no_errors(opened, page_file):
  assert opened.errors == []
  assert opened.requests == [page_file.as_uri()]
  assert opened.page.title() == "Rules & rates <on> digits"
  assert opened.page.locator("h1").inner_text() == "Rules & rates <on> digits"
  assert opened.page.locator("header").inner_text().count("26 finished, 1 failed") == 1


def test_click_on_a_head_sorts_numbers_as_numbers(opened):
  scroll_to(opened, "table.arms")
  found = head(opened, "arms", "test/accuracy")
  number = found.evaluate("head => head.cellIndex") + 1
  before = opened.column("arms", number)
  found.get_by_role("button").click()
  ascending = opened.column("arms", number)
  assert found.get_attribute("aria-sort") == "ascending"
  values = [float(cell) for cell in before if cell]
  assert ascending == [f"{value:.5g}" for value in sorted(values)] + [""]
  assert before != ascending
  found.get_by_role("button").click()
  assert found.get_attribute("aria-sort") == "descending"
  # what has no number stays last
  assert opened.column("arms", number) == [*ascending[-2::-1], ""]
  rate = head(opened, "arms", "learning_rate")
  rate.get_by_role("button").click()
  assert found.get_attribute("aria-sort") is None
  assert opened.column("arms", 3) == ["0.005"] * 9 + ["0.02"] * 9 + ["0.08"] * 9


def test_head_sorts_from_the_keyboard(opened):
  scroll_to(opened, "table.settings")
  found = head(opened, "settings", "update")
  found.get_by_role("button").focus()
  opened.page.keyboard.press("Enter")
  assert found.get_attribute("aria-sort") == "ascending"


def test_filter_by_words_and_comparisons(opened):
  scroll_to(opened, "table.arms")
  field = opened.page.locator("#filter")
  said = opened.page.locator("#filtered")
  assert said.inner_text() == "27 of 27 runs"
  for text, count in (
    ("adan", 9),
    ("adan learning_rate<0.05", 6),
    ("status=failed", 1),
    ("learning_rate>=0.02 seed=1", 6),
    ("test/accuracy>2", 0),
    ("not finite", 1),
    ("", 27),
  ):
    field.fill(text)
    assert said.inner_text() == f"{count} of 27 runs"
    assert len(opened.column("arms", 1)) == count


def test_best_setting_and_the_choice_by_validation_are_marked(opened):
  best = opened.page.locator("section#settings tr.best td").all_inner_texts()
  assert best[:2] == ["adan", "0.02"]
  rows = opened.page.locator("section#chosen tbody tr")
  chosen = {tuple(row.split("\t")[:2]) for row in rows.all_inner_texts()}
  assert chosen == {(rule, "0.02") for rule in RULES}
  failed = opened.page.locator("section#settings tr", has_text="1 failed")
  assert failed.count() == 1


def test_legend_hides_and_shows_lines(opened):
  scroll_to(opened, "#legend")
  everything = drawn_lines(opened, 0)
  assert len(everything) == 9
  button = opened.page.locator("#legend button").nth(4)
  button.click()
  assert button.get_attribute("aria-pressed") == "false"
  without = [name for name in everything if name != "adan, 0.02"]
  assert drawn_lines(opened, 0) == without
  # every panel follows, drawn again or for the first time
  assert drawn_lines(opened, 3) == without
  button.click()
  assert drawn_lines(opened, 0) == everything
  button.dblclick()
  assert drawn_lines(opened, 0) == ["adan, 0.02"]
  button.dblclick()
  assert drawn_lines(opened, 0) == everything


def test_means_and_runs_are_switched(opened):
  scroll_to(opened, "#legend")
  count = (
    "document.querySelector('[data-panel=\"0\"]')._fullData"
    ".reduce((n, t) => n + t.x.filter(x => x === null).length, 0)"
  )
  bands = (
    "document.querySelector('[data-panel=\"0\"]')._fullData"
    ".filter(t => t.fill === 'toself').length"
  )
  assert opened.page.evaluate(count) == 9
  assert opened.page.evaluate(bands) == 9
  before = opened.pixels("[data-panel='0']")
  opened.page.locator("[data-mode=arms]").click()
  assert opened.page.locator("[data-mode=arms]").get_attribute("aria-pressed") == "true"
  assert opened.page.evaluate(count) == 27
  assert opened.page.evaluate(bands) == 0
  assert not np.array_equal(before, opened.pixels("[data-panel='0']"))
  opened.page.locator("[data-mode=means]").click()
  assert opened.page.evaluate(count) == 9


def test_logarithmic_axis_is_switched(opened):
  scroll_to(opened, "[data-panel='1']")
  kind = "document.querySelector('[data-panel=\"1\"]')._fullLayout.yaxis.type"
  button = opened.page.locator("[data-log='1']")
  before = opened.page.evaluate(kind)
  button.click()
  assert {before, opened.page.evaluate(kind)} == {"linear", "log"}
  button.click()
  assert opened.page.evaluate(kind) == before
  assert opened.errors == []


def test_pointing_at_a_curve_names_it(opened):
  scroll_to(opened, "[data-panel='0']")
  plot = opened.page.locator("[data-panel='0'] .nsewdrag")
  box = plot.bounding_box()
  opened.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
  hover = opened.page.locator("[data-panel='0'] .hoverlayer .hovertext")
  hover.first.wait_for()
  said = hover.first.text_content()
  assert any(rule in said for rule in RULES)
  assert "step" in said


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (800, "dark")])
def test_every_figure_shows_something(browser, page_file, width, scheme):
  with browsers.Opened(
    browser, page_file, width=width, height=4500, color_scheme=scheme
  ) as opened:
    whole = opened.pixels("body")
    assert browsers.colours(whole) > 50
    assert (whole[2, 2].mean() > 0.5) == (scheme == "light")
    plots = opened.page.locator(".plot").all()
    # response, heat map, and loss and accuracy on two splits
    assert len(plots) == 6
    for plot in plots:
      box = plot.bounding_box()
      x, y = int(box["x"]), int(box["y"])
      part = whole[y : y + int(box["height"]), x : x + int(box["width"])]
      assert browsers.colours(part) > 20
    # nothing reaches beyond the window; wide tables scroll in their own frame
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width


def test_colour_scheme_may_change_while_the_page_is_open(opened):
  scroll_to(opened, "[data-panel='0']")
  colour = "document.querySelector('[data-panel=\"0\"]')._fullData.at(-1).line.color"
  light = opened.page.evaluate(colour)
  (blue, lifted), *_ = style.HUES
  for scheme, ink in (("dark", lifted), ("light", blue)):
    opened.page.emulate_media(color_scheme=scheme)
    line = opened.page.locator(f"#legend line[stroke='{ink}']").first
    line.wait_for(state="attached")
    assert (opened.page.evaluate(colour) == light) == (scheme == "light")
  assert opened.errors == []


def test_run_has_a_page_too(browser, tmp_path):
  folder = folders.write_run(
    tmp_path / "run", folders.config({}), **folders.measured(0.9, 0, 20)
  )
  with browsers.Opened(browser, report.write(folder)[0]) as opened:
    assert opened.errors == []
    assert opened.column("final", 1)[0] == "test/accuracy"
    assert drawn_lines(opened, 0) == ["train", "validation"]
    assert opened.page.locator("[data-mode]").count() == 0


def test_three_settings_have_parallel_coordinates(browser, tmp_path):
  arms = [
    ({RATE: r, "stages.train.batch_size": b, "model.width": w}, 0.9 - r)
    for r in (0.1, 0.2)
    for b in (32, 64)
    for w in (8, 16)
  ]
  folder = folders.write_sweep(tmp_path / "three", arms, points=3)
  with browsers.Opened(browser, report.write(folder)[0]) as opened:
    assert opened.errors == []
    assert browsers.colours(opened.pixels(".plot.parallel")) > 20


def test_damaged_and_waiting_runs_have_a_page(browser, tmp_path):
  folder = folders.write_sweep(tmp_path / "s", [({RATE: r}, 0.9) for r in (0.1, 0.2)])
  for arm in (folder / "arms").iterdir():
    (arm / "result.json").write_text("{")
    (arm / "metrics.jsonl").write_bytes(b"\xff\n{")
  with browsers.Opened(browser, report.write(folder)[0]) as opened:
    assert opened.errors == []
    remarks = opened.page.locator("table.arms td.remark").all_inner_texts()
    assert len(remarks) == 2
    assert all("result.json cannot be read." in remark for remark in remarks)


def test_five_hundred_runs_are_usable_within_three_seconds(browser, tmp_path):
  rng = np.random.default_rng(0)
  arms = [
    (
      {RATE: float(rate), f"{UPDATE}.adamw.weight_decay": float(decay), "seed": 0},
      0.3 + 0.6 * float(rate) / 0.1,
    )
    for rate, decay in 10 ** rng.uniform(-4, -1, (500, 2))
  ]
  folder = folders.write_sweep(tmp_path / "many", arms, points=50)
  file = report.write(folder)[0]
  # What runs beside slows a processor down as well: the best of three.
  for _ in range(3):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    # the page's own thread, on the clock of its processor
    session = context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready]", timeout=60_000)
    metrics = session.send("Performance.getMetrics")["metrics"]
    busy = {metric["name"]: metric["value"] for metric in metrics}["ThreadTime"]
    ready = float(page.evaluate("document.documentElement.dataset.ready")) / 1e3
    print(f"500 runs: ready after {ready:.2f} s, {busy:.2f} s of one processor")
    if busy < 3.0:
      break
    context.close()
  assert busy < 3.0
  assert page.locator("table.arms tbody tr").count() == 500
  page.wait_for_selector("html[data-drawn]", timeout=60_000)
  lengths = page.evaluate(
    "[...document.querySelectorAll('[data-panel]')].map(p =>"
    " p._fullData.reduce((n, t) => n + t.x.filter(x => x !== null).length, 0))"
  )
  assert lengths == [500 * 50] * 4
  context.close()
