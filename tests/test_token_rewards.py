"""The reward after every token, where an export was asked for it: in the graph, over HTTP, and as a line on the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from checkpoints_encoders import write_encoder
from rewardrt import RewardModel
from rewardrt.errors import RewardRTError, TraceError
from rewardrt.scoring import prefix
from rewardrt_export.pipeline import export
from server_process import Running, serving
from test_server_page import ANSWERS, PROMPT, fill, opened, shown

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


def test_the_page_draws_them_over_the_answer(server: Running) -> None:
    with opened(server) as page:
        fill(page)
        page.get_by_role("button", name="Score").click()
        ranking = shown(page)
        lines = page.query_selector_all("#ranking .tokens")
        assert len(lines) == len(ANSWERS)
        for (answer, _), line in zip(ranking, lines, strict=True):
            assert line.text_content().startswith(answer[:5])
            assert answer in line.text_content()
            colours = [
                node.evaluate("node => getComputedStyle(node).borderBottomColor")
                for node in line.query_selector_all("span")
            ]
            assert len(set(colours)) > 1


def test_a_model_that_reads_otherwise_is_refused(tmp_path: Path) -> None:
    write_encoder(tmp_path / "rm", "bert")
    with pytest.raises(TraceError, match="does not read one answer's reward at one token"):
        export(tmp_path / "rm", tmp_path / "bundle", token_rewards=True)
