"""A headless Chromium for tests of pages; nothing of it is downloaded."""

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
)


@contextlib.contextmanager
def launched() -> Iterator[Browser]:
  """The machine's Chromium; without one the tests skip, unless it is required."""
  found = next(filter(None, map(shutil.which, _NAMES)), None)
  if found is None and not os.environ.get("GRADLAB_REQUIRE_BROWSER"):
    pytest.skip("no Chromium: install Debian's chromium")
  assert found is not None, "GRADLAB_REQUIRE_BROWSER is set and there is no Chromium"
  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=found, args=list(_FLAGS))
    try:
      yield browser
    finally:
      browser.close()


class Opened:
  """A page with what went wrong in it: errors, console messages, requests."""

  def __init__(
    self,
    browser: Browser,
    file: Path,
    *,
    width: int = 1280,
    height: int = 900,
    **more: Any,
  ) -> None:
    """Opens the file and waits until all its figures are drawn."""
    viewport: ViewportSize = {"width": width, "height": height}
    self._context = browser.new_context(viewport=viewport, **more)
    self.page: Page = self._context.new_page()
    self.errors: list[str] = []
    self.requests: list[str] = []
    self.page.on("console", lambda message: self.errors.append(message.text))
    self.page.on("pageerror", lambda error: self.errors.append(str(error)))
    self.page.on("request", lambda request: self.requests.append(request.url))
    self.page.goto(file.as_uri())
    self.page.wait_for_selector("html[data-drawn]", timeout=60_000)

  def __enter__(self) -> "Opened":
    return self

  def __exit__(self, *_: object) -> None:
    self._context.close()

  def column(self, table: str, number: int) -> list[str]:
    """The shown cells of a table's column."""
    cells = f"table.{table} tbody tr:not([hidden]) td:nth-child({number})"
    return self.page.locator(cells).all_inner_texts()

  def pixels(self, selector: str) -> np.ndarray:
    """A screenshot of an element, [height, width, 3]."""
    data = self.page.locator(selector).first.screenshot()
    return image.imread(io.BytesIO(data))[:, :, :3]


def colours(pixels: np.ndarray) -> int:
  """How many colours a picture has."""
  levels = np.round(255 * pixels).astype(np.int64)
  return len(np.unique(levels @ np.asarray([65536, 256, 1])))
