"""The page at `/` in a browser, as tests of several models look at it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
AXE = "REWARDRT_AXE"  # where axe.min.js of the package axe-core is, which is not part of this project
PROMPT = "My sister ate my cake. What do I say to her?"
ANSWERS = [
    "Tell her that it was yours, and ask her to bake one with you.",
    "Shout.",
    "Nothing. Then eat hers, and her breakfast too, for a year: she has it coming.",
]


@contextmanager
def chromium() -> Iterator[Any]:
    """Start a browser."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, url: str, *, refusals: bool = False) -> Iterator[Any]:
    """Open the page; fails when it asks any other server for something, or when its script fails.

    With `refusals` the browser may report requests that were not answered or refused.
    """
    page = browser.new_page(viewport={"width": 1000, "height": 860})
    page.set_default_timeout(10_000)
    asked: list[str] = []
    faults: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.goto(url)
    if not refusals:
        page.locator("#about:not(:empty)").wait_for()
    yield page
    origin = "/".join(url.split("/")[:3])
    assert [each for each in asked if not each.startswith((f"{origin}/", "data:"))] == []
    assert [each for each in faults if not (refusals and each.startswith("Failed to load resource"))] == []
    page.close()


def fill(page: Any, answers: Sequence[str] = ANSWERS, prompt: str = PROMPT) -> None:
    """Write a prompt and answers to it."""
    page.get_by_label("Turn 1: user").fill(prompt)
    for index, answer in enumerate(answers):
        if index >= page.locator("#answers textarea").count():
            page.get_by_role("button", name="Add an answer").click()
        page.get_by_label(f"Answer {index + 1}", exact=True).fill(answer)


def press_score(page: Any) -> None:
    """Score what is written, and wait for the ranking."""
    page.get_by_role("button", name="Score").click()
    wait_for(page, "#status", "scored in")


def wait_for(page: Any, selector: str, text: str) -> None:
    """Wait until an element shows a text."""
    page.locator(selector).filter(has_text=text).wait_for()


def shown(page: Any) -> list[tuple[str, float]]:
    """Return the ranking on the page: the answers and their rewards."""
    page.locator("#ranking .value").first.wait_for()
    return [
        (item.query_selector(".answer").text_content(), float(item.query_selector(".value").get_attribute("value")))
        for item in page.query_selector_all("#ranking > li")
    ]


def table(page: Any, caption: str) -> list[list[str]]:
    """Return the cells of a table: the exact number where there is one, else the text."""
    rows: list[list[str]] = page.get_by_role("table", name=caption).evaluate(
        "table => [...table.rows].map(row => [...row.cells].map(cell => cell.querySelector('data')?.value ?? cell.innerText))"
    )
    return rows


def assert_accessible(page: Any) -> None:
    """Fail for what axe-core finds; does nothing where the variable REWARDRT_AXE does not name its axe.min.js."""
    if path := os.environ.get(AXE):
        page.evaluate(Path(path).read_text(encoding="utf-8"))
        found = page.evaluate("axe.run().then(({violations}) => violations.map(({id, nodes}) => [id, nodes[0].html]))")
        assert found == []


def picture(page: Any, name: str, selector: str = "main") -> None:
    """Keep a picture where one is wanted: REWARDRT_PICTURES names the folder."""
    if folder := os.environ.get("REWARDRT_PICTURES"):
        page.locator(selector).screenshot(path=str(Path(folder) / name))
