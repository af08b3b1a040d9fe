"""The page at `/`, in a browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rewardrt import RewardModel
from server_process import Running, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
PROMPT = "My sister ate my cake. What do I say to her?"
ANSWERS = [
    "Tell her that it was yours, and ask her to bake one with you.",
    "Shout.",
    "Nothing. Then eat hers, and her breakfast too, for a year: she has it coming.",
]


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Running]:
    with serving(tiny_bundle) as running:
        yield running


@contextmanager
def opened(server: Running) -> Iterator[Any]:
    """Open the page of a server; fails when it asks anybody else for something."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1000, "height": 860})
        asked: list[str] = []
        faults: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.goto(server.url)
        page.locator("#about:not(:empty)").wait_for()
        yield page
        assert [url for url in asked if not url.startswith((server.url, "data:"))] == []
        assert faults == []
        browser.close()


@pytest.fixture
def page(server: Running) -> Iterator[Any]:
    with opened(server) as page:
        yield page


def fill(page: Any) -> None:
    page.get_by_label("Text of turn 1").fill(PROMPT)
    page.get_by_role("button", name="Add an answer").click()
    for index, answer in enumerate(ANSWERS):
        page.get_by_label(f"Answer {index + 1}", exact=True).fill(answer)


def shown(page: Any) -> list[tuple[str, float]]:
    """Return the ranking on the page: the answers and their rewards."""
    page.wait_for_selector("#ranking .value")
    return [
        (item.query_selector(".answer").text_content(), float(item.query_selector(".value").text_content()))
        for item in page.query_selector_all("#ranking li")
    ]


def picture(page: Any, name: str) -> None:
    """Keep a picture where one is wanted: REWARDRT_PICTURES names the folder."""
    if folder := os.environ.get("REWARDRT_PICTURES"):
        page.screenshot(path=str(Path(folder) / name))


def test_answers_are_ranked_raw_and_normalised_with_the_offline_rewards(page: Any, tiny_bundle: Path) -> None:
    fill(page)
    page.keyboard.press("Control+Enter")
    offline = RewardModel.load(tiny_bundle)
    expected = offline.rank(prompt=PROMPT, responses=ANSWERS)
    assert shown(page) == [(answer.response, round(answer.reward, 4)) for answer in expected]
    assert f"{expected[0].tokens} tokens" in page.inner_text("#ranking li:first-child .note >> nth=1")
    picture(page, "page.png")
    before = page.inner_text("#ranking li:first-child .value")
    page.get_by_label("normalised").check()
    from playwright.sync_api import expect

    expect(page.locator("#ranking li:first-child .value")).not_to_have_text(before)
    expected = offline.rank(prompt=PROMPT, responses=ANSWERS, normalize=True)
    assert shown(page) == [(answer.response, round(answer.reward, 4)) for answer in expected]


def test_a_narrow_dark_screen_shows_everything_and_a_link_brings_it_back(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 1150})
    page.emulate_media(color_scheme="dark")
    fill(page)
    page.get_by_role("button", name="Score").click()
    before = shown(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    picture(page, "page-narrow.png")
    page.reload()
    page.locator("#about:not(:empty)").wait_for()
    assert page.get_by_label("Text of turn 1").input_value() == PROMPT
    page.get_by_role("button", name="Score").click()
    assert shown(page) == before


def test_an_empty_prompt_is_said_and_not_ranked(page: Any) -> None:
    page.get_by_role("button", name="Remove answer 2").click()
    page.get_by_role("button", name="Add a turn").click()
    page.get_by_role("button", name="Score").click()
    page.wait_for_selector("#status.bad")
    assert "found 'assistant'" in page.inner_text("#status")
    assert page.query_selector_all("#ranking li") == []
