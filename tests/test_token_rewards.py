"""The reward after every token, where an export was asked for it: in the graph, over HTTP, and as a line on the page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from checkpoints_encoders import write_encoder
from page_browser import ANSWERS, PROMPT, assert_accessible, chromium, fill, opened, picture, press_score, shown, table
from rewardrt import RewardModel
from rewardrt.errors import RewardRTError, TraceError
from rewardrt.scoring import prefix
from rewardrt_export.pipeline import export
from server_process import Running, serving

TINY = Path(__file__).parent.parent / "models" / "tiny"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(TINY, tmp_path_factory.mktemp("every") / "bundle", token_rewards=True).path


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Running]:
    with serving(bundle) as running:
        yield running


def test_each_is_the_reward_of_the_text_up_to_it(bundle: Path) -> None:
    model = RewardModel.load(bundle, precision="fp32")
    (text,) = model.answers.encode(model.answers.parse({"prompt": PROMPT, "response": ANSWERS[2]}).items)
    every = model.token_rewards(text)
    assert every.shape == (text.needed,)
    ends = range(2, text.needed + 1)
    beginnings = [dataclasses.replace(text, ids=text.ids[:end], positions=np.array([end - 1])) for end in ends]
    alone = np.array([values[0] for values in model.runner.run(beginnings)])
    assert np.abs(every[1:] - alone).max() < 1e-5
    assert np.ptp(every) > 0.1


def test_a_long_text_goes_in_parts_with_the_same_bits(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = RewardModel.load(bundle)
    (text,) = model.answers.encode(model.answers.parse({"prompt": PROMPT, "response": " ".join(ANSWERS * 4)}).items)
    whole = model.token_rewards(text)
    monkeypatch.setattr(prefix, "CHUNK", 16)
    assert text.needed > 64
    assert (model.token_rewards(text) == whole).all()


def test_the_rewards_themselves_keep_their_bits(bundle: Path, tiny_bundle: Path) -> None:
    with_tokens, without = RewardModel.load(bundle), RewardModel.load(tiny_bundle)
    assert with_tokens.session.has_token_rewards
    assert not without.session.has_token_rewards
    rows = [{"prompt": PROMPT, "response": answer} for answer in ANSWERS]
    assert with_tokens.score_many(rows).tolist() == without.score_many(rows).tolist()
    (text,) = without.answers.encode(without.answers.parse(rows[0]).items)
    with pytest.raises(RewardRTError, match="no rewards of tokens"):
        without.token_rewards(text)


def test_clients_get_them(server: Running, bundle: Path) -> None:
    model = RewardModel.load(bundle)
    (text,) = model.answers.encode(model.answers.parse({"prompt": PROMPT, "response": ANSWERS[0]}).items)
    every = model.token_rewards(text).tolist()
    row = {"prompt": PROMPT, "response": ANSWERS[0]}
    (found,) = httpx.post(f"{server.url}/v1/reward", json={"rows": [row], "token_rewards": True}).json()["rows"]
    pieces, values = zip(*found["token_rewards"], strict=True)
    assert ANSWERS[0] in "".join(pieces)
    assert np.float32(values).tolist() == every
    rendered = model.answers.renderer.render(model.answers.parse(row).items[0]).text
    answer = httpx.post(f"{server.url}/pooling", json={"input": rendered, "task": "token_classify"})
    assert answer.status_code == 200
    assert np.float32(answer.json()["data"][0]["data"])[:, 0].tolist() == every


def test_the_page_colours_the_answers_tokens_in_the_place_of_its_text(server: Running, bundle: Path) -> None:
    model = RewardModel.load(bundle)
    # Answers that are also in the template, in the prompt, and such as the template takes white space off.
    answers = [*ANSWERS, "s", PROMPT, " two\nlines "]
    with chromium() as browser, opened(browser, server.url) as page:
        fill(page)
        press_score(page)
        picture(page, "server-page-tokens.png", "#result")
        fill(page, answers)
        press_score(page)
        page.locator("#ranking > li").nth(len(answers) - 1).wait_for()
        ranked = shown(page)
        expected = [float(str(np.float32(answer.reward))) for answer in model.rank(prompt=PROMPT, responses=answers)]
        assert [reward for _, reward in ranked] == expected
        assert sorted(text for text, _ in ranked) == sorted(answers)  # and nothing of the template
        edges = [text.split(" to ") for text in page.locator("#legend li").all_inner_texts()]
        assert [low for low, _ in edges[1:]] == [high for _, high in edges[:-1]]
        page.locator("details").first.click()
        rows = table(page, "Reward after each token")
        every = values_of(model, ranked[0][0])
        answer_rows = rows[1:]
        assert "".join(json.loads(text) for text, _ in answer_rows) == ranked[0][0]
        numbers = [float(value) for _, value in answer_rows]
        start = every.index(numbers[0])
        assert every[start : start + len(numbers)] == numbers
        classes = (
            page.locator(".tokens").first.locator("span").evaluate_all("spans => spans.map(span => span.className[1])")
        )
        low, high = float(edges[0][0]), float(edges[-1][1])
        assert np.abs(np.array(numbers) - [low + (high - low) * (int(each) + 0.5) / 5 for each in classes]).max() < (
            0.6 * (high - low) / 5
        )
        assert_accessible(page)
        page.get_by_label("show the template's tokens").check()
        whole = page.locator(".tokens").first.text_content()
        assert (
            whole.startswith("<|im_end|>\n<|im_start|>assistant\n") and ranked[0][0] in whole and whole.endswith("</s>")
        )
        page.locator("details").first.click()
        assert table(page, "Reward after each token")[-1] == ['"</s>"', str(every[-1])] and every[-1] == expected[0]
        page.emulate_media(color_scheme="dark")
        assert_accessible(page)


def test_the_page_strikes_out_what_was_not_read(bundle: Path) -> None:
    with serving(bundle, "--max-length", "40") as server, chromium() as browser, opened(browser, server.url) as page:
        fill(page)
        press_score(page)
        cut = page.locator("#ranking > li").filter(has_text="cut off, not read")
        unread = cut.locator(".unread")
        assert unread.count() == 2
        for answer, rest in zip(cut.locator(".tokens").all(), unread.all(), strict=True):
            assert answer.text_content() in ANSWERS
            assert 0 < len(rest.text_content()) < len(answer.text_content())


def values_of(model: RewardModel, answer: str) -> list[float]:
    """The rewards after each token, as JSON has them."""
    (text,) = model.answers.encode(model.answers.parse({"prompt": PROMPT, "response": answer}).items)
    return [float(str(np.float32(value))) for value in model.token_rewards(text)]


def test_a_model_that_reads_otherwise_is_refused(tmp_path: Path) -> None:
    write_encoder(tmp_path / "rm", "bert")
    with pytest.raises(TraceError, match="does not read one answer's reward at one token"):
        export(tmp_path / "rm", tmp_path / "bundle", token_rewards=True)
