"""How a server is run: keys, logs, sockets, TLS, bundles loaded anew, and what clients and texts cannot do to it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from commands import run
from panicking_bundle import make_panicking
from rewardrt import RewardModel
from rewardrt.server.engine import Engine, Work
from rewardrt.text.items import RawText
from server_process import Running, serving
from waiting import started, until

BUNDLE = Path(__file__).parent / "bundles" / "version-1"
ROW = {"rows": [{"prompt": "Name a colour.", "response": "Blue."}]}


def reward(answer: httpx.Response) -> float:
    value: float = answer.json()["rows"][0]["reward"]
    return value


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(BUNDLE, "--served-name", "m", "--api-key", "secret", "--log-texts") as running:
        yield running


KEY = {"authorization": "Bearer secret"}


def test_a_panic_of_the_tokenizer_is_its_own_texts_error(tmp_path: Path) -> None:
    bundle = make_panicking(BUNDLE, tmp_path / "bundle")
    offline = RewardModel.load(bundle, provider="cpu")
    good, bad = offline.score_rows([{"text": "plain"}, {"text": "caf\u00e9"}])
    assert not isinstance(good, Exception) and isinstance(bad, Exception)
    rows = [{"text": "plain"}, {"text": "caf\u00e9"}, {"text": "plain"}]
    done = run("score", bundle, "-", stdin="\n".join(map(json.dumps, rows)).encode())
    written = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1 and ["error" in row for row in written] == [False, True, False]
    with serving(bundle) as running, concurrent.futures.ThreadPoolExecutor(8) as pool:

        def post(index: int) -> Any:
            text = "caf\u00e9" if index % 4 == 0 else "plain"
            return text, httpx.post(f"{running.url}/v1/reward", json={"rows": [{"text": text}]}, timeout=30).json()

        for text, answer in pool.map(post, range(40)):
            row = answer["rows"][0]
            assert ("error" in row) == (text != "plain")
            assert row.get("reward", good.reward) == pytest.approx(good.reward, rel=1e-6)
        assert httpx.get(f"{running.url}/health").status_code == 200


def test_an_engine_that_dies_is_started_again_and_gives_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = RewardModel.load(BUNDLE, provider="cpu", threads=1)
    engine = Engine(model, max_queue_tokens=100_000)
    deaths = 0
    score = engine._score_turn

    def dies(slices: Any) -> None:
        nonlocal deaths
        if deaths < 2:
            deaths += 1
            raise SystemError("out of the blue")
        score(slices)

    monkeypatch.setattr(engine, "_score_turn", dies)
    done = threading.Event()
    for _ in range(3):
        done.clear()
        job = engine.submit(Work((RawText("plain"),)), lambda job: done.set())
        assert done.wait(20)
    assert deaths == 2 and not job.failure and engine.fault is None
    engine.close()
    engine.join(10)


def test_a_log_that_cannot_be_written_stops_no_scoring() -> None:
    command = [sys.executable, "-c", "from rewardrt.cli.app import main; main()", "serve", str(BUNDLE), "--port"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def ready() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
        return False

    with Path("/dev/full").open("wb") as full, started([*command, str(port)], stderr=full) as process:
        until(ready)
        found = {reward(httpx.post(f"http://127.0.0.1:{port}/v1/reward", json=ROW)) for _ in range(5)}
    assert len(found) == 1 and process.returncode == 0


def test_log_lines_cannot_be_forged_and_hold_refused_bodies_too(server: Running) -> None:
    paths = ("/v1/x%0A2026-01-01%20GET%20/admin%20200", "/v1/%1B%5B31mred", "/v1/\"quoted'")
    for path in paths:
        with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=10) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            while connection.recv(65536):  # bounded: the connection has a timeout of 10 s
                pass
    answer = httpx.post(f"{server.url}/v1/reward", headers=KEY, json={"rows": [{"marker": "refusedbody"}], "odd": 1})
    assert answer.status_code == 400
    server.wait_for("refusedbody")
    unauthorized = httpx.post(f"{server.url}/v1/reward", json={"rows": [{"text": "nokeybody"}]})
    assert unauthorized.status_code == 401
    assert not any(re.match(r"2026-01-01 GET /admin", line) or "\x1b" in line for line in server.log)


def test_what_is_not_found_or_not_allowed_is_in_the_log_and_the_metrics(server: Running) -> None:
    assert httpx.get(f"{server.url}/v1/nothing-there", headers=KEY).status_code == 404
    assert httpx.get(f"{server.url}/get_reward", headers=KEY).status_code == 405
    answer = httpx.post(f"{server.url}/v1/reward/", headers=KEY, json=ROW)
    assert answer.status_code == 404 and "location" not in answer.headers  # no redirect to the client's Host
    server.wait_for("nothing-there")
    text = httpx.get(f"{server.url}/metrics", headers=KEY).text
    for status in ("404", "405"):
        assert re.search(rf'rewardrt_requests_total{{[^}}]*status="{status}"[^}}]*}} [1-9]', text), status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "https://elsewhere.example"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"x-forwarded-for": "8.8.8.8"}, 200),
        ({}, 200),
    ],
)
def test_a_page_of_another_site_cannot_post(server: Running, headers: dict[str, str], status: int) -> None:
    sent = {"content-type": "application/json"} | KEY | headers
    answer = httpx.post(f"{server.url}/v1/reward", headers=sent, content=json.dumps(ROW).encode())
    assert answer.status_code == status
    if "x-forwarded-for" in headers:  # no proxy was named, so nobody is believed
        time.sleep(0.2)
        assert not any("8.8.8.8" in line for line in server.log)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("", "found an empty one, which would guard nothing"),
        (" secret", "begins or ends with white space"),
        ("secret\t", "begins or ends with white space"),
        ("schl\u00fcssel", "expected printable ASCII characters"),
    ],
)
def test_a_key_that_guards_nothing_or_never_matches_is_refused_at_the_start(
    key: str, message: str, tmp_path: Path
) -> None:
    done = run("serve", BUNDLE, "--api-key", key)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and message in done.stderr
    file = tmp_path / "keys"
    file.write_text(f"{key}\n", encoding="utf-8")
    refused = run("serve", BUNDLE, "--api-key-file", file)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1


def test_keys_of_a_file_each_open_the_server(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first\nsecond\n")
    with serving(BUNDLE, "--api-key-file", tmp_path / "keys") as running:
        for key, status in (("first", 200), ("second", 200), ("third", 401), ("", 401)):
            headers = {"x-api-key": key} if key else {}
            assert httpx.post(f"{running.url}/v1/reward", headers=headers, json=ROW).status_code == status


def test_a_unix_socket_and_tls_serve_the_same_rewards(tmp_path: Path) -> None:
    expected = float(str(np.float32(RewardModel.load(BUNDLE, provider="cpu").score(**ROW["rows"][0]))))  # type: ignore[arg-type]
    path = tmp_path / "rewards.sock"
    command = [sys.executable, "-c", "from rewardrt.cli.app import main; main()", "serve", str(BUNDLE)]
    with started([*command, "--uds", str(path), "--root-path", "/rewards"], stderr=subprocess.DEVNULL):
        client = httpx.Client(transport=httpx.HTTPTransport(uds=str(path), retries=3), base_url="http://localhost")
        until(path.exists)
        time.sleep(0.2)
        assert reward(client.post("/v1/reward", json=ROW)) == expected
        client.close()
    pem = tmp_path / "cert.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate, and it is not installed")
    subprocess.run([*made, "-keyout", str(pem) + ".key", "-out", str(pem)], check=True, capture_output=True, timeout=60)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--tls-cert", str(pem), "--tls-key", f"{pem}.key", "--port", str(port)]
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    answers: list[httpx.Response] = []

    def answered() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            answers.append(httpx.post(f"https://127.0.0.1:{port}/v1/reward", json=ROW, verify=context))
        return bool(answers)

    with started([*command, *options], stderr=subprocess.DEVNULL):
        until(answered)
        assert reward(answers[0]) == expected


def test_a_bundle_is_loaded_anew_under_load_and_every_answer_is_from_one_of_them(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    """Twenty reloads between two bundles while clients post: nothing lost, and header and reward go together."""
    link = tmp_path / "served"
    folders = {"version-1": BUNDLE, "tiny": tiny_bundle}
    hashes = {hashlib.sha256((path / "reward.json").read_bytes()).hexdigest(): name for name, path in folders.items()}
    wanted = {
        name: RewardModel.load(path, provider="cpu").score(**ROW["rows"][0])  # type: ignore[arg-type]
        for name, path in folders.items()
    }
    link.symlink_to(BUNDLE)
    with serving(link, "--served-name", "m", "--api-key", "secret") as running:
        ended = threading.Event()
        answers: list[tuple[str, float]] = []
        lost: list[str] = []

        def client() -> None:
            with httpx.Client(base_url=running.url, headers=KEY, timeout=30) as session:
                while not ended.is_set():
                    answer = session.post("/v1/reward", json=ROW)
                    if answer.status_code != 200:
                        lost.append(answer.text)
                        continue
                    answers.append((hashes[answer.headers["x-rewardrt-bundle"]], reward(answer)))

        clients = [threading.Thread(target=client) for _ in range(4)]
        for each in clients:
            each.start()
        for index in range(20):
            fresh = tmp_path / f"link-{index}"
            fresh.symlink_to(folders["tiny" if index % 2 == 0 else "version-1"])
            fresh.replace(link)
            answer = httpx.post(f"{running.url}/v1/reload", headers=KEY, timeout=60)
            assert answer.status_code == 200, answer.text
        ended.set()
        for each in clients:
            each.join(60)
        assert httpx.post(f"{running.url}/v1/reload").status_code == 401
    assert lost == []
    assert {name for name, _ in answers} == {"version-1", "tiny"}
    assert all(np.float32(value) == np.float32(wanted[name]) for name, value in answers)


def test_a_reload_that_fails_leaves_the_old_bundle(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(BUNDLE, folder)
    with serving(folder, "--api-key", "secret") as running:
        before = reward(httpx.post(f"{running.url}/v1/reward", headers=KEY, json=ROW))
        (folder / "reward.json").write_text("{")
        answer = httpx.post(f"{running.url}/v1/reload", headers=KEY, timeout=60)
        assert answer.status_code >= 500 and "the old bundles are served on" in answer.text
        assert reward(httpx.post(f"{running.url}/v1/reward", headers=KEY, json=ROW)) == before
        running.process.send_signal(signal.SIGUSR1)
        running.wait_for("the old ones are served on")
        assert running.stop(signal.SIGHUP) == 0


def test_message_shapes_of_templates_pass_over_http(server: Running) -> None:
    offline = RewardModel.load(BUNDLE, provider="cpu")
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Name a colour."}]},
        {"role": "assistant", "content": "Blue."},
    ]
    expected = offline.score(messages=messages)
    for path, body in (
        ("/v1/reward", {"rows": [{"messages": messages}]}),
        ("/classify", {"model": "m", "messages": messages}),
    ):
        answer = httpx.post(f"{server.url}{path}", headers=KEY, json=body).json()
        found = answer["rows"][0]["reward"] if "rows" in answer else answer["data"][0]["probs"][0]
        assert np.float32(found) == np.float32(expected)
    tools = [{"type": "function", "function": {"name": "f"}}]
    for field, value in (
        ("tools", tools),
        ("documents", [{"text": "x"}]),
        ("chat_template_kwargs", {"thinking": True}),
    ):
        answer = httpx.post(
            f"{server.url}/classify", headers=KEY, json={"model": "m", "messages": messages, field: value}
        )
        assert answer.status_code == 400  # this template reads none of them
        assert "does not read" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/score", {"model": "m", "text_1": "q", "text_2": "d", "encoding_format": "float"}),
        ("/v1/classify", {"model": "m", "input": "text", "cache_salt": "s", "priority": 1}),
        ("/v2/rerank", {"model": "m", "query": "q", "documents": [{"text": "d", "title": "t"}], "rank_fields": ["text"]}),
        ("/v1/rerank", {"model": "m", "query": "q", "documents": ["d"], "max_chunks_per_doc": 10}),
        ("/v2/models/m/versions/1/infer", {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}),
        ("/v2/models/m/infer", {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}], "parameters": {"priority": 1, "timeout": 100}}),
    ],
)  # fmt: skip
def test_requests_as_the_clients_documentation_shows_them_work(server: Running, path: str, body: Any) -> None:
    answer = httpx.post(f"{server.url}{path}", headers=KEY, json=body)
    assert answer.status_code == 200, answer.text


def test_kserve_errors_are_a_string_and_a_model_is_described(server: Running) -> None:
    answer = httpx.post(f"{server.url}/v2/models/m/infer", headers=KEY, json={"inputs": []})
    assert answer.status_code == 400 and isinstance(answer.json()["error"], str)
    assert httpx.get(f"{server.url}/v1/models/m", headers=KEY).status_code == 200
