"""The server: its own protocol and OpenRLHF's, access, limits, and how it ends."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

import commands
from conftest import ROOT
from rewardrt import RewardModel
from rewardrt.server.openapi import document
from server_process import Running, serving
from waiting import until

TEXTS = [f"text {index} of several " * (1 + index % 7) for index in range(64)]


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Running]:
    with serving(tiny_bundle, "--max-items", 100, "--max-body-mb", 1) as running:
        yield running


@pytest.fixture(scope="module")
def offline(tiny_bundle: Path) -> RewardModel:
    return RewardModel.load(tiny_bundle)


def post(server: Running, path: str, body: object, **headers: str) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=60)


def as_bits(values: object) -> list[int]:
    return np.array(values, dtype=np.float32).view(np.int32).tolist()


def test_sixty_four_clients_of_openrlhf_get_the_offline_rewards_bit_for_bit(
    server: Running, offline: RewardModel
) -> None:
    def ask(text: str) -> float:
        body = {"query": [text], "prompts": ["p"], "labels": ["l"]}
        answer = post(server, "/get_reward", body).json()
        assert answer == {
            "rewards": answer["rewards"],
            "scores": answer["rewards"],
            "extra_logs": {"dummy_scores": answer["rewards"], "truncated": [0]},
        }
        return answer["rewards"][0]

    with concurrent.futures.ThreadPoolExecutor(64) as clients:
        rewards = list(clients.map(ask, TEXTS))
    assert as_bits(rewards) == as_bits([offline.score(text=text) for text in TEXTS])


def test_openrlhf_gets_empty_lists_for_empty_lists(server: Running) -> None:
    answer = post(server, "/get_reward", {"query": [], "prompts": [], "labels": []})
    assert (answer.status_code, answer.json()) == (
        200,
        {"rewards": [], "scores": [], "extra_logs": {"dummy_scores": [], "truncated": []}},
    )


def test_rows_come_out_as_rewardrt_score_writes_them(server: Running, tiny_bundle: Path, tmp_path: Path) -> None:
    rows = [
        {"id": 1, "prompt": "a", "response": "b"},
        {"prompt": "a", "responses": ["b", "c", ""]},
        {"prompt": "a", "chosen": "b", "rejected": "c", "kept": [None]},
        {"text": "exactly this"},
        {"prompt": "no answer"},
        {"text": "long " * 3000},
    ]
    answer = post(server, "/v1/reward", {"rows": rows}).json()
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = commands.run("score", tiny_bundle, tmp_path / "in.jsonl")
    assert answer["rows"] == [json.loads(line) for line in done.stdout.splitlines()]
    assert answer["rows"][5]["truncated"] > 0


def test_a_text_over_the_limit_is_cut_or_refused_as_the_request_says(server: Running) -> None:
    row = {"prompt": "a", "response": "many words " * 20}
    cut = post(server, "/v1/reward", {"rows": [row], "max_length": 24})
    assert (cut.json()["rows"][0]["tokens"], cut.headers["x-rewardrt-truncated"]) == (24, "1")
    refused = post(server, "/v1/reward", {"rows": [row], "max_length": 24, "overflow": "error"}).json()["rows"][0]
    whole = 24 + cut.json()["rows"][0]["truncated"]
    assert refused["error"] == f"{whole} tokens are more than the limit of 24; shorten the text"


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/get_reward", {"query": ["a"], "temperature": 1}, 400, "temperature: not a field that is understood here; expected only query, prompts, labels"),
        ("/get_reward", {"query": "a"}, 400, "query: expected array, found string"),
        ("/get_reward", {"query": [""]}, 400, "item 0: text: expected at least one character, found an empty string"),
        ("/get_reward", {}, 400, "query: expected this field, found none"),
        ("/get_reward", {"query": ["a"] * 101}, 400, "101 texts in one request; expected at most 100"),
        ("/get_reward", {"query": ["a" * 2**20]}, 413, "the body is over the limit of 1048576 bytes; send fewer texts at a time"),
        ("/v1/reward", {"rows": [], "model": "other"}, 404, "model 'other' is not served here; expected tiny"),
        ("/v1/reward", {"rows": [], "aggregate": "min"}, 400, "aggregate 'min': this model gives one reward to a text, there are no steps"),
        ("/v1/reward", {"rows": [], "token_rewards": True}, 400, "token_rewards: the bundle of model 'tiny' has none"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused_by_name(
    server: Running, path: str, body: object, status: int, message: str
) -> None:
    answer = post(server, path, body)
    error = answer.json()["error"]
    assert (answer.status_code, error if isinstance(error, str) else error["message"]) == (status, message)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b'{"rows": [NaN]}', b"[" * 100_000, b"1" * 5000, b"null", b"[]"])
def test_a_body_that_is_no_json_object_is_a_400(server: Running, data: bytes) -> None:
    assert httpx.post(f"{server.url}/v1/reward", content=data).status_code == 400


def test_health_tells_what_was_loaded_and_what_runs(server: Running, tiny_bundle: Path, offline: RewardModel) -> None:
    (model,) = httpx.get(f"{server.url}/health").json()["models"]
    assert model["sha256"] == hashlib.sha256((tiny_bundle / "reward.json").read_bytes()).hexdigest()
    assert (model["provider"], model["precision"], model["fault"]) == ("cpu", "fp32", None)
    assert model["certificate"]["texts"] == offline.bundle.certificate("fp32").texts


def test_every_route_but_these_wants_the_key(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--api-key", "sesame") as running:
        paths = [
            (method.upper(), path.format(model="tiny", version="1"))
            for path, methods in document()["paths"].items()
            for method in methods
        ]
        found = {
            (method, path): httpx.request(method, running.url + path, headers=headers).status_code
            for method, path in paths
            for headers in ({}, {"x-api-key": "wrong"}, {"authorization": "Bearer wröng".encode()})
        }
        described = (ROOT / "docs" / "serving.md").read_text().partition("Open to everybody:")[2].partition("\n\n")[0]
        opened = set(re.findall(r"`(/[^`]*)`", described))
        assert {path for (_, path), status in found.items() if status not in (401, 403)} == opened
        assert found["POST", "/v1/reload"] == 401
        for headers in ({"authorization": "Bearer sesame"}, {"x-api-key": "sesame"}):
            answer = httpx.post(f"{running.url}/get_reward", json={"query": ["a"]}, headers=headers)
            assert answer.status_code == 200


def test_sigterm_answers_what_was_accepted_and_ends_with_0(tiny_bundle: Path, offline: RewardModel) -> None:
    texts = [f"{index} " + "word " * 1500 for index in range(12)]
    with serving(tiny_bundle, "--threads", 1) as running, concurrent.futures.ThreadPoolExecutor(4) as clients:
        accepted = clients.submit(post, running, "/get_reward", {"query": texts})
        until(lambda: 'rewardrt_queue_tokens{model="tiny"} 0.0' not in httpx.get(f"{running.url}/metrics").text)
        running.process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{running.url}/ready").status_code != 200)
        refused = post(running, "/get_reward", {"query": ["late"]})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        answer = accepted.result(60)
        assert answer.status_code == 200
        assert as_bits(answer.json()["rewards"][:2]) == as_bits([offline.score(text=text) for text in texts[:2]])
        assert running.process.wait(timeout=30) == 0


def test_a_server_that_was_killed_starts_again_on_its_port_and_a_second_one_does_not(tiny_bundle: Path) -> None:
    with serving(tiny_bundle) as running:
        port = int(running.url.rpartition(":")[2])
        httpx.get(f"{running.url}/info")
        second = commands.run("serve", tiny_bundle, "--port", port)
        assert (second.returncode, second.stderr) == (
            2,
            f"error: 127.0.0.1:{port} cannot be had (Address already in use); stop what listens there, or choose "
            "another --port\n",
        )
        assert running.stop(signal.SIGKILL) == -9
    with serving(tiny_bundle, port=port) as running:
        assert post(running, "/get_reward", {"query": ["a"]}).status_code == 200


def test_a_bundle_that_changes_on_disk_is_said_and_the_hash_is_that_of_the_loaded_one(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "copy"
    shutil.copytree(tiny_bundle, bundle)
    with serving(bundle) as running:
        before = post(running, "/get_reward", {"query": ["a"]}).json()
        (bundle / "reward.json").rename(bundle / "old.json")
        (bundle / "reward.json").write_text((bundle / "old.json").read_text() + "\n")
        (model,) = httpx.get(f"{running.url}/health").json()["models"]
        assert model["sha256"] == hashlib.sha256((tiny_bundle / "reward.json").read_bytes()).hexdigest()
        assert model["changed_on_disk"] is True
        assert post(running, "/get_reward", {"query": ["a"]}).json() == before


def test_a_full_queue_is_a_503_that_says_when_to_try_again(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--threads", 1, "--max-queue-tokens", 100, "--max-wait-seconds", 0) as running:
        texts = ["word " * 1500] * 12  # taken although it is too much: nothing else waits
        with concurrent.futures.ThreadPoolExecutor(1) as client:
            large = client.submit(post, running, "/get_reward", {"query": texts})
            until(lambda: 'rewardrt_queue_tokens{model="tiny"} 0.0' not in httpx.get(f"{running.url}/metrics").text)
            refused = post(running, "/get_reward", {"query": ["a"]})
            assert refused.status_code == 503
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert large.result(60).status_code == 200


def test_metrics_tell_how_many_tokens_were_shared_in_a_turn_and_kept_between_turns(
    tiny_bundle: Path, offline: RewardModel
) -> None:
    def counted(running: Running, name: str) -> int:
        (line,) = [
            line for line in httpx.get(f"{running.url}/metrics").text.splitlines() if line.startswith(f"{name}{{")
        ]
        return int(float(line.split()[-1]))

    prompt = "word " * 100
    with serving(tiny_bundle, "--prefix-cache-mb", 8) as running:
        for answers in (["a", "b", "c"], ["d"]):
            rows = [{"prompt": prompt, "responses": answers}] if len(answers) > 1 else []
            rows += [{"prompt": prompt, "response": answers[0]}] if not rows else []
            given = post(running, "/v1/reward", {"rows": rows}).json()["rows"][0]
            found = given.get("rewards", [given.get("reward")])
            assert as_bits(found) == as_bits([offline.score(prompt=prompt, response=answer) for answer in answers])
        tokens = counted(running, "rewardrt_tokens_total")
        computed = counted(running, "rewardrt_computed_tokens_total")
    assert tokens > 4 * 100
    assert computed < tokens / 3  # the prompt once, and four ends


def test_the_log_has_a_line_for_each_request_and_no_text(server: Running) -> None:
    post(server, "/v1/reward", {"rows": [{"prompt": "a secret", "response": "word"}], "max_length": 9})
    assert "texts=1 tokens=9 " in server.wait_for("POST /v1/reward 200 protocol=rewardrt model=tiny texts=1 tokens=9")
    assert "secret" not in "\n".join(server.log)


def test_several_bundles_are_chosen_by_model(tiny_bundle: Path) -> None:
    with serving("--bundle", f"one={tiny_bundle}", "--bundle", f"two={tiny_bundle}") as running:
        found = [post(running, "/v1/reward", {"rows": [], "model": name}).json()["model"] for name in ("one", "two")]
        assert found == ["one", "two"]
        assert [model["id"] for model in httpx.get(f"{running.url}/v1/models").json()["data"]] == ["one", "two"]


def test_an_address_beyond_this_machine_without_a_key_is_warned_about(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--host", "0.0.0.0") as running:
        assert running.wait_for("warning: 0.0.0.0 can be reached from other machines, and no --api-key guards it")


def test_without_the_extra_the_command_that_installs_it_is_named(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from rewardrt.cli.app import app
    from rewardrt.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "rewardrt.server.process", raising=False)
    result = CliRunner().invoke(app, ["serve", str(tiny_bundle)])
    assert isinstance(result.exception, MissingExtraError)
    assert str(result.exception) == "serve needs uvicorn: pip install 'rewardrt[serve]'"
