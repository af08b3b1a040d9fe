"""The page at `/`, in a browser. Models with rewards of tokens, steps and others have a test beside their own ones."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from page_browser import (
    ANSWERS,
    AXE,
    PROMPT,
    assert_accessible,
    chromium,
    fill,
    opened,
    picture,
    press_score,
    shown,
    wait_for,
)
from rewardrt import RewardModel
from server_process import Running, serving

KEY = "sesame"


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Running]:
    with serving(tiny_bundle) as running:
        yield running


@pytest.fixture(scope="module")
def guarded(tiny_bundle: Path) -> Iterator[Running]:
    with serving(tiny_bundle, "--api-key", KEY, "--max-length", "40") as running:
        yield running


@pytest.fixture(scope="module")
def offline(tiny_bundle: Path) -> RewardModel:
    return RewardModel.load(tiny_bundle)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Any]:
    with opened(browser, server.url) as page:
        yield page


def ranking(offline: RewardModel, answers: list[str], *, normalize: bool = False, **prompt: Any) -> Any:
    """Return what `shown` has to return, by the offline model."""
    ranked = offline.rank(responses=answers, normalize=normalize, **(prompt or {"prompt": PROMPT}))
    return [(answer.response, float(str(np.float32(answer.reward)))) for answer in ranked]


def posted(page: Any) -> list[Any]:
    """Return the list that the bodies of requests for rewards go into."""
    bodies: list[Any] = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    return bodies


def test_answers_are_ranked_raw_and_normalised_with_the_offline_rewards(page: Any, offline: RewardModel) -> None:
    fill(page)
    page.keyboard.press("Control+Enter")
    expected = ranking(offline, ANSWERS)
    assert shown(page) == expected
    rewards = [reward for _, reward in expected]
    assert page.locator(".value").all_inner_texts() == [f"{reward:.4f}" for reward in rewards]
    gaps = [f"{rewards[0] - reward:.4f} below the best" for reward in rewards[1:]]
    assert page.locator(".gap").all_inner_texts() == ["best", *gaps]
    tokens = offline.rank(prompt=PROMPT, responses=ANSWERS)[0].tokens
    assert f"{tokens} tokens read" in page.inner_text("#ranking > li:first-child")
    assert "3 answers scored in" in page.inner_text("#status")
    assert "Best: answer 2." in page.inner_text("#status")
    picture(page, "server-page.png")
    page.get_by_label("normalised").check()
    page.locator(f".value[value='{ranking(offline, ANSWERS, normalize=True)[0][1]}']").wait_for()
    assert shown(page) == ranking(offline, ANSWERS, normalize=True)


def test_a_link_scores_itself_and_every_width_shows_everything(page: Any, offline: RewardModel) -> None:
    fill(page)
    press_score(page)
    link = page.url
    page.goto("about:blank")
    page.set_viewport_size({"width": 360, "height": 1150})
    page.emulate_media(color_scheme="dark")
    page.goto(link)
    assert shown(page) == ranking(offline, ANSWERS)
    assert page.get_by_label("Turn 1: user").input_value() == PROMPT
    picture(page, "server-page-narrow.png")
    for width in (360, 700, 1400, 2000):
        page.set_viewport_size({"width": width, "height": 1000})
        assert page.evaluate("document.documentElement.scrollWidth") == width


def test_a_link_that_is_not_whole_or_damaged_is_not_scored(page: Any) -> None:
    bodies = posted(page)
    fill(page, ["", ""])
    page.get_by_role("button", name="Copy a link").click()
    link = page.url
    page.goto("about:blank")
    page.goto(link)
    page.locator("#about:not(:empty)").wait_for()
    assert page.get_by_label("Turn 1: user").input_value() == PROMPT
    page.goto(link + "!")  # in the same tab, as a link that is pasted
    wait_for(page, "#status", "The link is damaged: nothing was read from it.")
    assert page.get_by_label("Turn 1: user").input_value() == PROMPT
    fill(page, ["word " * 40_000])
    page.get_by_role("button", name="Copy a link").click()
    wait_for(page, "#status.bad", "Too long for a link: it takes 200,000 bytes.")
    assert page.url.partition("#")[2] == ""
    assert bodies == []


def test_an_empty_answer_is_not_scored_and_its_field_says_so(page: Any, offline: RewardModel) -> None:
    bodies = posted(page)
    fill(page, [ANSWERS[0], " \n", ANSWERS[2]])
    note = page.locator("#answer-2-hint")
    assert not note.is_visible()
    press_score(page)
    assert shown(page) == ranking(offline, [ANSWERS[0], ANSWERS[2]])
    assert [row["response"] for row in bodies[0]["rows"]] == [ANSWERS[0], ANSWERS[2]]
    assert note.inner_text() == "Empty: not scored."
    assert page.locator(".hint:visible").count() == 1
    assert page.get_by_label("Answer 2", exact=True).get_attribute("aria-describedby") == "answer-2-hint"
    assert "1 answer empty: not scored." in page.inner_text("#status")
    page.get_by_label("Answer 2", exact=True).fill("Shout.")
    assert not note.is_visible()


def test_what_is_missing_is_named_and_nothing_is_sent(page: Any) -> None:
    bodies = posted(page)
    page.get_by_role("button", name="Score").click()
    wait_for(page, "#status.bad", "The prompt is empty.")
    assert page.evaluate("document.activeElement.id") == "turn-1-user"
    page.keyboard.type(PROMPT)
    page.keyboard.press("Control+Enter")
    wait_for(page, "#status.bad", "No answer is written.")
    assert page.evaluate("document.activeElement.id") == "answer-1"
    assert page.locator("#ranking > li").count() == 0
    assert bodies == []


def test_a_turn_comes_with_the_one_that_makes_the_conversation_valid(page: Any, offline: RewardModel) -> None:
    bodies = posted(page)
    fill(page)
    page.get_by_role("button", name="Add a turn").click()
    assert page.evaluate("document.activeElement.id") == "turn-2-assistant"
    page.get_by_role("button", name="Score").click()
    wait_for(page, "#status.bad", "Turn 2: assistant: this turn is empty.")
    assert page.get_by_label("Turn 3: user").get_attribute("aria-invalid") == "true"
    assert bodies == []
    page.get_by_role("button", name="Add a system message").click()
    texts = ["Be kind.", PROMPT, "Was it a good cake?", "It was my birthday's."]
    for label, text in zip(("System message", "Turn 1: user", "Turn 2: assistant", "Turn 3: user"), texts, strict=True):
        page.get_by_label(label, exact=True).fill(text)
    press_score(page)
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    assert shown(page) == ranking(offline, ANSWERS, prompt=messages)
    page.get_by_role("button", name="Remove turns 1 and 2").click()
    assert page.evaluate("document.activeElement.id") == "add-turn"
    page.get_by_role("button", name="Remove system message").click()
    assert page.get_by_label("Turn 1: user").input_value() == texts[3]
    press_score(page)
    assert shown(page) == ranking(offline, ANSWERS, prompt=texts[3])


def test_an_old_ranking_is_dimmed_until_it_is_of_what_is_written(page: Any) -> None:
    fill(page)
    press_score(page)
    colour = "getComputedStyle(document.querySelector('.bar')).backgroundColor"
    fresh = page.evaluate(colour)
    changes = [
        lambda: page.get_by_label("Answer 2", exact=True).fill("Shout!"),
        lambda: page.get_by_label("Turn 1: user").fill("What now?"),
        lambda: page.get_by_role("button", name="Add an answer").click(),
        lambda: page.get_by_role("button", name="Remove answer 1").click(),
        lambda: page.get_by_role("button", name="Add a turn").click(),
    ]
    for change in changes:
        change()
        assert page.inner_text("#old").startswith("Changed since")
        assert page.evaluate(colour) != fresh
    page.get_by_role("button", name="Remove turns 2 and 3").or_(
        page.get_by_role("button", name="Remove turns 1 and 2")
    ).first.click()
    page.get_by_label("Turn 1: user").fill("What now?")
    press_score(page)
    assert page.inner_text("#old") == ""
    assert page.evaluate(colour) == fresh
    page.get_by_label("Turn 1: user").fill("What then?")
    assert page.inner_text("#old") != ""
    page.get_by_label("Turn 1: user").fill("What now?")  # as it was scored
    assert page.inner_text("#old") == ""


def test_no_key_and_a_wrong_key_are_told_apart_and_the_key_is_in_no_link(
    browser: Any, guarded: Running, server: Running
) -> None:
    with opened(browser, server.url) as page:
        fill(page)
        press_score(page)
        fragment = page.url.partition("#")[2]
    with opened(browser, f"{guarded.url}/#{fragment}", refusals=True) as page:
        wait_for(page, "#access-reason", f"{guarded.url} wants an API key.")
        assert page.inner_text("#status") == "The API key is missing."
        assert page.evaluate("document.activeElement.id") == "key"
        assert_accessible(page)
        for wrong in ("open", "ключ"):
            page.keyboard.type(wrong)
            page.keyboard.press("Enter")
            text = (
                f"{guarded.url} refused this API key" if wrong == "open" else "A key has only letters, digits and signs"
            )
            wait_for(page, "#access-reason", text)
            assert page.get_by_label("API key").get_attribute("aria-invalid") == "true"
            assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type(f" {KEY} ")
        page.keyboard.press("Enter")
        assert len(shown(page)) == 3  # the link's answers, as soon as there is a key
        assert not page.locator("#access").is_visible()
        assert "reads up to 40 tokens" in page.inner_text("#about")
        page.get_by_role("button", name="Copy a link").click()
        held = json.loads(base64.urlsafe_b64decode(page.url.partition("#")[2] + "=="))
        assert KEY not in json.dumps(held)
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_a_text_that_was_cut_says_so(browser: Any, guarded: Running, offline: RewardModel) -> None:
    info, listed = (
        httpx.get(f"{guarded.url}/{path}", headers={"x-api-key": KEY}).json() for path in ("info", "v1/models")
    )
    assert (info["max_input_length"], info["models"][0]["max_length"], listed["data"][0]["max_model_len"]) == (
        40,
        40,
        40,
    )
    with opened(browser, guarded.url, refusals=True) as page:
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        fill(page)
        press_score(page)
        (long,) = [answer for answer in offline.rank(prompt=PROMPT, responses=ANSWERS) if answer.index == 2]
        wait_for(page, "#ranking > li", f"40 tokens read, {long.tokens - 40} tokens at the end cut off, not read")
        assert page.locator(".cut").count() == 2


def test_a_server_that_is_gone_is_named_and_asked_again(browser: Any, tiny_bundle: Path, offline: RewardModel) -> None:
    with serving(tiny_bundle) as first, opened(browser, first.url, refusals=True) as page:
        page.locator("#about:not(:empty)").wait_for()
        fill(page)
        first.stop()
        page.get_by_role("button", name="Score").click()
        wait_for(page, "#status.bad", f"No answer from {first.url}: it may have stopped or be starting anew")
        assert_accessible(page)
        again = page.get_by_role("button", name="Try again")
        again.click()
        wait_for(page, "#status.bad", "No answer from")
        with serving(tiny_bundle, port=int(first.url.rpartition(":")[2])):
            again.click()
            assert shown(page) == ranking(offline, ANSWERS)
            assert not again.is_visible()


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (502, "<html>Bad gateway</html>", "answered with status 502 and no JSON: a proxy before it may be at fault."),
        (503, '{"error": {"message": "the queue is full; try again later"}}', "the queue is full; try again later"),
    ],
)
def test_a_failure_on_the_way_offers_to_try_again(
    browser: Any, server: Running, status: int, body: str, expected: str
) -> None:
    with opened(browser, server.url, refusals=True) as page:
        page.route("**/v1/reward", lambda route: route.fulfill(status=status, body=body))
        page.locator("#about:not(:empty)").wait_for()
        fill(page)
        page.get_by_role("button", name="Score").click()
        wait_for(page, "#status.bad", expected)
        page.unroute("**/v1/reward")
        page.get_by_role("button", name="Try again").click()
        assert len(shown(page)) == 3


def with_rewards(page: Any, rewards: list[Any]) -> None:
    """Let the page get these rewards, whatever it sends; a text is the error of a row."""

    def answer(route: Any) -> None:
        rows = [
            {"error": each} if isinstance(each, str) else {"reward": each, "tokens": 9, "truncated": 0}
            for each in rewards
        ]
        route.fulfill(json={"model": "tiny", "rows": rows, "tokens": 9})

    page.route("**/v1/reward", answer)
    fill(page, [f"Answer of {reward}" for reward in rewards])
    for index in range(page.locator("#answers textarea").count(), len(rewards), -1):
        page.get_by_role("button", name=f"Remove answer {index}").click()
    page.get_by_role("button", name="Score").click()
    wait_for(page, "#status", "scored in")


@pytest.mark.parametrize(
    ("rewards", "texts", "gaps", "axis"),
    [
        ([-1.5, -4.0, -2.25], ["-1.5000", "-2.2500", "-4.0000"], ["best", "0.7500", "2.5000"], ["-4", "-1"]),
        ([-1.0, 2.0], ["2.0000", "-1.0000"], ["best", "3.0000"], ["-1", "0", "2"]),
        ([3.1011004, 3.1011653], ["3.101165", "3.101100"], ["best", "0.000065"], ["3.1011", "3.1012"]),
        ([1e-20, 3e-20], ["3.0000e-20", "1.0000e-20"], ["best", "2.0000e-20"], ["1e-20", "3e-20"]),
        ([-3.4028235e38, 3.4028235e38], ["3.4028e+38", "-3.4028e+38"], ["best", "6.8056e+38"], ["-5e+38", "0", "5e+38"]),
        ([0.5, 0.5, 0.25], ["0.5000", "0.5000", "0.2500"], ["best", "best", "0.2500"], ["0.2", "0.5"]),
        ([-2.0, -2.0], ["-2.0000", "-2.0000"], ["best", "best"], ["-3", "-1"]),
        ([0.0, 0.0], ["0.0000", "0.0000"], ["best", "best"], ["-0.5", "0", "0.5"]),
        ([1.25], ["1.2500"], [], []),
        ([2.0, None, 1.0], ["2.0000", "1.0000"], ["best", "1.0000"], ["1", "2"]),
        ([2.0, "the reward is not finite", 1.0], ["2.0000", "1.0000"], ["best", "1.0000"], ["1", "2"]),
    ],
)  # fmt: skip
def test_bars_have_one_axis_on_which_the_best_is_longest(
    page: Any, rewards: list[Any], texts: list[str], gaps: list[str], axis: list[str]
) -> None:
    with_rewards(page, rewards)
    assert page.locator(".value").all_inner_texts() == texts
    assert [gap.removesuffix(" below the best") for gap in page.locator(".gap").all_inner_texts()] == gaps
    assert page.locator("#axis span").all_inner_texts() == axis
    values = [value for _, value in shown(page)[: len(texts)]] if len(texts) == len(rewards) else [2.0, 1.0]
    widths = page.evaluate("[...document.querySelectorAll('.bar')].map(bar => parseFloat(bar.style.width))")
    low, high = (float(axis[0]), float(axis[-1])) if axis else (0, 1)
    assert widths == (pytest.approx([100 * (value - low) / (high - low) for value in values], abs=1e-3) if axis else [])
    assert all(0 <= width <= 100 for width in widths) and widths == sorted(widths, reverse=True)
    unscored = len(rewards) - len(texts)
    assert page.get_by_text("no reward", exact=True).count() == unscored
    assert page.get_by_text("Not scored: the reward is not finite").count() == sum(
        isinstance(each, str) for each in rewards
    )
    assert ("1 answer could not be scored." in page.inner_text("#status")) == bool(unscored)
    assert page.evaluate("document.documentElement.scrollWidth") == 1000


def test_equal_rewards_share_a_place(page: Any) -> None:
    with_rewards(page, [0.5, 1.0, 1.0])
    places = [text.split("\n")[0] for text in page.locator("#ranking > li").all_inner_texts()]
    assert places == ["1. Answer 2", "1. Answer 3", "3. Answer 1"]


def test_a_request_that_is_refused_as_a_whole_is_one_line(page: Any) -> None:
    page.route(
        "**/v1/reward",
        lambda route: route.fulfill(
            json={"model": "tiny", "rows": [{"error": "the template refuses"}] * 3, "tokens": 0}
        ),
    )
    fill(page)
    page.get_by_role("button", name="Score").click()
    wait_for(page, "#status.bad", "the template refuses")
    assert page.locator("#ranking > li").count() == 0


def test_a_long_answer_is_folded(page: Any) -> None:
    long = "It was mine. " * 120
    fill(page, [long, "Shout."])
    press_score(page)
    button = page.get_by_role("button", name="Show all")
    assert button.count() == 1
    text = page.locator(".answer").filter(has_text="It was mine.")
    folded = text.bounding_box()["height"]
    assert text.text_content() == long
    button.press("Enter")
    button = page.get_by_role("button", name="Show less")
    assert button.get_attribute("aria-expanded") == "true"
    assert text.bounding_box()["height"] > 1.5 * folded
    button.click()
    assert text.bounding_box()["height"] == folded


def test_the_example_is_ranked_by_the_keyboard_alone(page: Any, offline: RewardModel) -> None:
    visited = []
    for _ in range(12):
        page.keyboard.press("Tab")
        visited.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert visited == [
        "API", "example", "turn-1-user", "add-turn", "add-system",
        "Remove answer 1", "answer-1", "Remove answer 2", "answer-2", "add-answer", "score",
        page.evaluate("document.activeElement.id || document.activeElement.textContent"),
    ]  # fmt: skip
    page.get_by_role("button", name="Load an example").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "score"  # the button is gone: there is something to lose
    assert not page.locator("#example").is_visible()
    page.keyboard.press("Enter")
    ranked = shown(page)
    prompt = page.get_by_label("Turn 1: user").input_value()
    assert ranked == ranking(
        offline, [page.get_by_label(f"Answer {i}", exact=True).input_value() for i in (1, 2, 3)], prompt=prompt
    )
    assert page.locator("#status").get_attribute("role") == "status"
    assert page.inner_text("#shortcut") == "Ctrl+Enter"


def test_the_page_leads_to_the_api(page: Any) -> None:
    page.get_by_role("link", name="API").click()
    page.wait_for_url("**/docs")
    assert "/v1/reward" in page.content()


def test_axe_finds_nothing(page: Any) -> None:
    if AXE not in os.environ:
        pytest.skip(f"{AXE} does not name axe.min.js of the package axe-core")
    assert_accessible(page)
    page.get_by_role("button", name="Score").click()
    assert_accessible(page)
    fill(page, [*ANSWERS, "", "It was mine. " * 120])
    press_score(page)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert_accessible(page)
        page.get_by_label("Turn 1: user").fill(f"In the {scheme}?")
        assert_accessible(page)
        page.get_by_label("Turn 1: user").fill(PROMPT)
