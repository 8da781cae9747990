"""The report's page in a real browser: quiet, within its window at every width, sortable, in both colour schemes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import report_artifacts
from browser import Browser
from pipestill.stages.report import report

pytestmark = pytest.mark.browser
SIZES = [(360, 800), (768, 1024), (1280, 800)]
ROWS = "[...document.querySelectorAll('#table tbody tr')].map(row => row.querySelector('.run').textContent.trim())"
WIDEST = """(() => {
  const inside = (node) => node.closest('.scroll, .toc .wrap, .hidden, .skip');
  return Math.max(...[...document.body.querySelectorAll('*')].filter((node) => !inside(node))
    .map((node) => node.getBoundingClientRect().right));
})()"""
CONTRAST = """(() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (colour.startsWith('rgb(')) return channels(colour);
    }
    return [255, 255, 255];
  };
  const words = [...document.querySelectorAll('p, dt, dd, th, td, a, h1, h2, h3, summary *, figcaption, caption')];
  let lowest = [99, ''];
  for (const node of words) {
    if (node.closest('.hidden, .skip') || !node.textContent.trim() || !node.checkVisibility()) continue;
    const [a, b] = [light(channels(getComputedStyle(node).color)), light(ground(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < lowest[0]) lowest = [ratio, node.outerHTML.slice(0, 120)];
  }
  return lowest;
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPESTILL_RUNS", str(root / "runs"))
        params = report_artifacts.build(root, seeds=5)
        report(params, places=report_artifacts.places(root), output=root / "report")
    return root / "report" / "index.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_it_loads_quietly_and_fits(browser: Browser, page: Path, width: int, height: int, dark: bool) -> None:
    browser.open(page, width=width, height=height, dark=dark)
    assert browser.problems == []
    assert {address for address in browser.requests if not address.startswith("data:")} == {page.as_uri()}
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(WIDEST) <= width + 0.5
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(18, 22, 25)" if dark else "rgb(245, 243, 239)")
    assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    ratio, where = browser.run(CONTRAST)
    assert ratio >= 4.5, where


@pytest.mark.parametrize(("width", "height"), [SIZES[0], SIZES[-1]])
def test_every_fold_opens_within_the_window(browser: Browser, page: Path, width: int, height: int) -> None:
    browser.open(page, width=width, height=height)
    browser.run("document.querySelectorAll('details').forEach(node => node.open = true)")
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(WIDEST) <= width + 0.5


def test_a_table_that_is_too_wide_scrolls_in_its_box(browser: Browser, page: Path) -> None:
    browser.open(page, width=360, height=800)
    box = browser.run("(b => [b.scrollWidth, b.clientWidth])(document.querySelector('#results .scroll'))")
    assert box[0] > box[1]
    browser.run("document.querySelector('#results .scroll').scrollLeft = 300")
    left = "Math.round(document.querySelector('#table tbody th').getBoundingClientRect().left)"
    edge = "Math.round(document.querySelector('#results .scroll').getBoundingClientRect().left + 1)"
    assert browser.run(left) == browser.run(edge), "the run's name stays in sight"


@pytest.mark.parametrize(("width", "shown", "away"), [(360, "narrow", "wide"), (1280, "wide", "narrow")])
def test_charts_come_in_the_size_that_fits(browser: Browser, page: Path, width: int, shown: str, away: str) -> None:
    browser.open(page, width=width, height=800)
    assert browser.run(f"document.querySelector('#distances .{shown}').checkVisibility()")
    assert not browser.run(f"document.querySelector('#distances .{away}').checkVisibility()")
    scale = browser.run(
        f"(s => s.clientWidth / s.viewBox.baseVal.width)(document.querySelector('#distances .{shown} svg'))"
    )
    assert 0.8 < scale < 1.25, "letters keep their size"


def test_the_table_sorts_and_comes_back(browser: Browser, page: Path) -> None:
    browser.open(page)
    first = browser.run(ROWS)
    press = "[...document.querySelectorAll('#table th button')].find(b => b.textContent == '{}').click()"
    browser.run(press.format("Distance"))
    by_distance = browser.run(ROWS)
    assert by_distance[:3] == ["Real against real", "teacher-heun-79", "student-10"]
    assert by_distance[-1] == "teacher-euler-4"
    assert browser.run("document.querySelectorAll('#table [aria-sort=ascending]').length") == 1
    browser.run(press.format("Distance"))
    assert browser.run(ROWS) == ["Real against real", *reversed(by_distance[1:])]
    browser.run(press.format("Distance"))
    assert browser.run(ROWS) == first
    browser.run(press.format("Run"))
    assert browser.run(ROWS)[1:3] == ["student-4", "student-10"]
    assert browser.problems == []


def test_a_link_in_the_chain_opens_what_it_names(browser: Browser, page: Path) -> None:
    browser.open(page)
    shown = "document.getElementById('artefact-models-student-4').checkVisibility()"
    assert not browser.run(shown)
    browser.run("document.querySelector('#artefact-samples-student-4 .descent a').click()")
    browser.run("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
    assert browser.run(shown)
    assert browser.problems == []


def test_it_prints(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.pdf().startswith(b"%PDF")
