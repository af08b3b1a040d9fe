"""The report: one page that asks nobody for anything, with hostile texts in it, in a browser at several widths."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewardrt.errors import RewardRTError
from rewardrt.evaluate.comparison import compare
from rewardrt.evaluate.evaluation import Evaluation, Objective, as_json, card_line, evaluate, with_comparison
from rewardrt.evaluate.report import prepare, write_report
from rewardrt.evaluate.sources import Options
from saying_model import SUBJECT, SayingModel, score, write_lines

pytest.importorskip("matplotlib", reason="matplotlib, which draws the report, is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
HOSTILE = (
    "</pre><script>document.title='run'</script><img src=x onerror=alert(1)> \x1b[31m \u202eevil &lt; \"'" + "w" * 300
)
VOID = {"meta", "path", "use", "rect", "br", "img", "line", "circle"}


class Tags(HTMLParser):
    """The tags and addresses of a page, and whether every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> list[Evaluation]:
    """Pairs and groups with hostile texts in every place that a page shows."""
    folder, random = tmp_path_factory.mktemp("rows"), np.random.default_rng(1)
    pairs = []
    for at in range(300):
        chosen, rejected = random.normal(0.4, 1, 2)
        lengths = random.integers(20, 900, 2)
        pairs.append(
            {"id": f"{at}{HOSTILE[:30]}", "prompt": f"{at} {HOSTILE}", "subset": f"s{at % 4}<b>语\x1b[1m\ud800", "old": [1.5, float(at % 3)],
             "chosen": f"{chosen} {lengths[0]} {3 * (at == 7)}", "rejected": f"{rejected} {lengths[1]} 0"}
        )  # fmt: skip
    pairs.append({"prompt": HOSTILE, "chosen": "<i>what", "rejected": "0"})
    several = [
        {"prompt": f"{at}\n{HOSTILE}", "responses": [str(each) for each in random.normal(0, 1, 4)],
         "correct": [at % 5 == place for place in range(4)]}
        for at in range(60)
    ]  # fmt: skip
    options = Options(by="id", earlier=("old",))
    scores = score(SayingModel(), write_lines(folder / "pairs<x>.jsonl", pairs), options=options)
    first = evaluate(scores, SUBJECT, by="id", resamples=100)
    assert scores.earlier is not None
    first = with_comparison(first, compare(scores, scores.earlier, "old <other>", resamples=100))
    assert scores.summary.unread == {}
    first = replace(first, objectives=[Objective(f"kind <{at}>", 0.5 + at / 20, 0.1, -0.2) for at in range(5)])
    return [first, evaluate(score(SayingModel(), write_lines(folder / "n.jsonl", several)), SUBJECT, resamples=100)]


@pytest.fixture(scope="module")
def report(evaluations: list[Evaluation], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "report"
    prepare(folder)
    card = [card_line(each, SUBJECT, "1") for each in evaluations]
    data = {"rewardrt": "1", "model": as_json(SUBJECT), "card": card, "evaluations": as_json(evaluations)}
    return write_report(folder, data, evaluations, SUBJECT)


def test_the_page_shows_texts_and_runs_none(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert not tags.seen & {"script", "img", "iframe", "link", "object", "form", "i", "a"}
    assert [address for address in tags.addresses if not address.startswith("#")] == []
    assert "document.title" in page, "the texts are there"
    assert "\\x1b[31m" in page
    assert "\\u202eevil" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", page)
    assert re.findall(r"url\((?!#)", page) == []


def test_the_page_is_small_and_whole(report: Path) -> None:
    page = report.read_text(encoding="utf-8")
    assert len(page.encode()) < 1_500_000
    assert page.count("<svg ") == 9, "six charts of pairs; of groups no subsets, one length and no objectives"
    for title in ("Scores", "Rewards", "Margins", "Reward against length", "Calibration of margins", "Objectives"):
        assert f"<figcaption>{title}</figcaption>" in page
    assert "prefers-color-scheme:dark" in page
    assert "#000101" not in page, "colours are the page's"
    assert page.count("var(--right)") > 20


def test_the_data_beside_the_page_has_what_it_shows(report: Path, evaluations: list[Evaluation]) -> None:
    data = json.loads((report.parent / "evaluation.json").read_text())
    first = data["evaluations"][0]
    assert first["failed"] == 1
    assert first["numbers"][0]["value"] == evaluations[0].score.value
    assert first["comparisons"][0]["rows"] == 300
    assert first["worst"][0]["gap"] == max(row["gap"] for row in first["worst"])
    assert len(first["worst"]) == 20
    assert sum(first["rewards"]["right"]) == 300
    assert data["card"][0].startswith("Pairs: ")


def test_a_report_is_not_written_over_another(report: Path) -> None:
    with pytest.raises(RewardRTError, match="has a report already; delete it, or name another folder"):
        prepare(report.parent)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1100), ("dark", 1100), ("light", 360), ("dark", 360)])
def test_the_page_can_be_read_at_any_width(report: Path, scheme: Any, width: int) -> None:
    """Nothing is wider than the window, words of charts have a size to be read, and nobody is asked for anything."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        asked: list[str] = []
        faults: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.goto(report.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.title().startswith("saying: Pairs")
        smallest = page.evaluate(
            "Math.min(...[...document.querySelectorAll('svg text')].map(each => each.getBoundingClientRect().height))"
        )
        assert smallest > 8, "pixels"
        colors = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        dark = [sum(map(int, re.findall(r"\d+", color)[:3])) < 380 for color in colors]
        assert dark == ([True, False] if scheme == "dark" else [False, True])
        tick = page.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
        assert (sum(map(int, re.findall(r"\d+", tick)[:3])) < 380) == (scheme == "light")
        browser.close()
    assert asked == [report.as_uri()]
    assert faults == []
