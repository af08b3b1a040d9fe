"""RewardClient: the rewards of a loaded bundle, over servers that are slow, busy, wrong, or die."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewardrt import RewardClient, RewardModel, RewardRTError, RowError, ServerError, TruncationWarning
from server_process import Running, serving
from waiting import started, until

BUNDLE = Path(__file__).parent / "bundles" / "version-1"
SHA256 = "5" * 64
ROWS: list[dict[str, Any]] = [
    {"prompt": f"What is {number}?", "response": "A number. " * (number % 7) + "Yes."} for number in range(300)
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(BUNDLE, "--served-name", "one", "--served-name", "other", "--api-key", "sesame") as running:
        yield running


@pytest.fixture(scope="module")
def offline() -> RewardModel:
    return RewardModel.load(BUNDLE)


@pytest.fixture
def client(server: Running) -> Iterator[RewardClient]:
    with RewardClient(server.url, api_key="sesame") as made:
        yield made


def test_every_call_gives_what_the_loaded_bundle_gives(client: RewardClient, offline: RewardModel) -> None:
    assert client.score_many(ROWS).tobytes() == offline.score_many(ROWS).tobytes()
    asked: dict[str, Any] = {"prompt": "Say a colour.", "responses": ["Blue.", "7", "Blue."]}
    assert client.rank(**asked) == offline.rank(**asked)
    assert client.score(**ROWS[3]) == offline.score(**ROWS[3])
    rows: list[Any] = [
        asked,
        {"prompt": "a", "chosen": "b", "rejected": "c", "id": object()},  # what is not scored is not sent
        {"text": "exactly this"},
        {"prompt": "no answer"},
        "no row",
        {"prompt": "a", "response": "\ud800"},
        {"prompt": "a", "response": "b", "system": "x"},
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
            ]
        },
        {"prompt": "a", "response": "b", "instruction": "judge"},
    ]
    expected, found = offline.score_rows(rows), client.score_rows(rows)
    assert [each for each in found if not isinstance(each, RewardRTError)] == [
        each for each in expected if not isinstance(each, RewardRTError)
    ]
    assert list(map(str, found)) == list(map(str, expected))
    assert [type(each) for each in found] == [type(each) for each in expected]
    assert sum(isinstance(each, RowError) for each in found) == 5
    assert client.score_rows([]) == [] and client.score_many([]).shape == (0,)


def test_coroutines_share_requests_and_keep_their_order(server: Running, offline: RewardModel) -> None:
    async def all_at_once(client: RewardClient) -> list[float]:
        return await asyncio.gather(*(client.ascore(**row) for row in ROWS))

    with RewardClient(server.url, api_key="sesame", batch_rows=50) as client:
        client.describe()
        before = len(server.log)
        found = asyncio.run(all_at_once(client))
        again = asyncio.run(all_at_once(client))  # on another event loop

    def sizes() -> list[int]:
        lines = [line for line in server.log[before:] if "/v1/reward" in line]
        return [int(line.split("texts=")[1].split()[0]) for line in lines]

    until(lambda: sum(sizes()) >= 600)  # lines are written a little after the answer
    assert found == again == offline.score_many(ROWS).tolist()
    assert sum(sizes()) == 600 and max(sizes()) <= 50 and 12 <= len(sizes()) <= 200


def test_what_is_cut_is_said(client: RewardClient, offline: RewardModel) -> None:
    row = {"prompt": "a", "response": "word " * 4000}
    with pytest.warns(TruncationWarning, match="1 of 1 texts were cut at") as caught:
        found = client.score_many([row])
    assert caught[0].filename == __file__
    with pytest.warns(TruncationWarning):
        assert found.tobytes() == offline.score_many([row]).tobytes()


def test_the_server_is_known_and_held_to_what_was_expected(server: Running, client: RewardClient) -> None:
    about = client.describe()
    assert (about["name"], about["family"], about["provider"]) == ("one", "openrlhf", "cpu")
    key: dict[str, Any] = {"api_key": "sesame"}
    with RewardClient(
        server.url, model="other", expect_sha256=about["sha256"], require_certificate=True, **key
    ) as same:
        assert same.score(text="a") == client.score(text="a")
    with RewardClient(server.url, expect_sha256=SHA256, **key) as other, pytest.raises(ServerError) as refused:
        other.score(text="a")
    assert str(refused.value) == (
        f"{server.url}: serves the bundle with the manifest SHA-256 {about['sha256']}, and not {SHA256}, which was "
        "expected; make a new client if that is right"
    )
    with (
        RewardClient(server.url, model="third", **key) as unknown,
        pytest.raises(ServerError, match="404, model 'third' is"),
    ):
        unknown.score(text="a")
    with (
        RewardClient(server.url, api_key="wrong") as wrong,
        pytest.raises(ServerError, match="401, an API key is not the"),
    ):
        wrong.score(text="a")
    with (
        pytest.raises(ServerError, match=r"without a route$"),
        RewardClient(f"{server.url}/v1/reward", **key) as routed,
    ):
        routed.score(text="a")
    with pytest.raises(ServerError, match="aggregate 'min': this model gives one reward"):
        client.score_many([{"text": "a"}], aggregate="min")


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://a", "http://", "http:///x", "http://a?b", "unix:"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ServerError, match=r"expected a server's address, such as http://127\.0\.0\.1:8000 or unix:"):
        RewardClient(url)


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="at least one server's address"):
        RewardClient([])
    with pytest.raises(ServerError, match="batch_rows and concurrency of at least 1"):
        RewardClient("http://a", batch_rows=0)
    with pytest.raises(ServerError, match="no negative time"):
        RewardClient("http://a", patience=-1)
    with pytest.raises(ServerError, match="expected the file of a CA, found none"):
        RewardClient("https://a", tls_ca=tmp_path / "none.pem")


def test_the_key_is_read_from_the_environment_and_never_shown(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARDRT_API_KEY", "sesame")
    with RewardClient(server.url, model="one") as client:
        assert client.score(text="a") == client.score(text="a")
        assert repr(client) == f"RewardClient('{server.url}', model='one')"


Answer = tuple[int, dict[str, str], bytes] | Callable[[], None]


class Stub:
    """A server whose answers are written out: `script` is what each POST gets in turn, and then the last for ever."""

    def __init__(self, script: list[Any], *, sha256: str = SHA256, info: Any = None) -> None:
        self.requests: list[Any] = []
        self.times: list[float] = []
        self.script, self.sha256 = script, sha256
        model = {"name": "m", "sha256": sha256, "objectives": [], "certificate": None, "precision": "fp32"}
        self.info = {"server": "rewardrt", "models": [model]} if info is None else info
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.answer(200, {}, json.dumps(stub.info).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                stub.requests.append(body)
                stub.times.append(time.monotonic())
                step = stub.script.pop(0) if len(stub.script) > 1 else stub.script[0]
                if callable(step):
                    step = step(body)
                if step is None:
                    self.close_connection = True  # without a word
                    return
                self.answer(*step)

            def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in (headers | {"content-length": str(len(body))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self._thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))

    def good(self, body: Any) -> Answer:
        """Give each row the length of its text as its reward."""
        rows = [row | {"reward": len(row["text"]) / 4, "tokens": 1, "truncated": 0} for row in body["rows"]]
        return 200, {"x-rewardrt-bundle": self.sha256}, json.dumps({"rows": rows, "model": "m", "tokens": 1}).encode()

    def __enter__(self) -> Stub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()
        self._thread.join(10)


def refusal(status: int, kind: str = "x", message: str = "no", **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, named, json.dumps({"error": {"message": message, "type": kind}}).encode()


def with_good(script: list[Any], **options: Any) -> Stub:
    stub = Stub(script, **options)
    stub.script = [*script, stub.good]
    return stub


TEXTS = [{"text": "x" * number} for number in range(1, 9)]
REWARDS = [number / 4 for number in range(1, 9)]


@pytest.mark.parametrize(
    "failures",
    [
        [refusal(503), refusal(429), refusal(502), refusal(504)],
        [lambda body: None, lambda body: None],
        [refusal(500), refusal(500)],
    ],
    ids=["busy", "connections that end", "a fault of the server's own"],
)
def test_what_can_be_tried_again_is(failures: list[Any]) -> None:
    with with_good(failures) as stub, RewardClient(stub.url, patience=20) as client:
        assert client.score_many(TEXTS).tolist() == REWARDS
        assert len(stub.requests) == len(failures) + 1
        assert all(request == stub.requests[0] for request in stub.requests)


def test_a_server_that_says_when_to_come_again_is_left_alone_until_then() -> None:
    with with_good([refusal(503, retry_after="1")]) as stub, RewardClient(stub.url) as client:
        assert client.score_many(TEXTS).tolist() == REWARDS
        assert stub.times[1] - stub.times[0] > 0.7


@pytest.mark.parametrize(
    ("answer", "said", "tries"),
    [
        (refusal(400, message="bad"), "400, bad$", 1),
        (refusal(401), "401, an API key is wanted; give api_key, or set REWARDRT_API_KEY$", 1),
        (refusal(403, message="not you"), "403, not you$", 1),
        (refusal(404, "unknown_model", "no such model"), "404, no such model$", 1),
        (refusal(500, message="broken"), "500, broken$", 3),
        ((200, {}, b"{}"), "expected a RewardRT server's answer to 1 rows, found KeyError", 1),
        ((200, {}, b"\xff<html>"), "expected a RewardRT server's answer to 1 rows, found", 1),
        ((200, {}, b'{"rows": [{"reward": "1", "tokens": 1, "truncated": 0}]}'), "found TypeError", 1),
        ((200, {}, b'{"rows": []}'), "found ValueError..0 rows", 1),
        ((302, {"location": "http://127.0.0.1:9/"}, b""), "302, Found$", 1),
    ],
)  # fmt: skip
def test_what_cannot_be_tried_again_is_said_at_once(
    answer: Answer, said: str, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REWARDRT_API_KEY", raising=False)
    with Stub([answer]) as stub, RewardClient(stub.url) as client:
        with pytest.raises(ServerError, match=said):
            client.score(text="a")
        assert len(stub.requests) == tries


def test_another_kind_of_server_is_found_out() -> None:
    for info in ({"model_id": "tei"}, [], {"server": "rewardrt-like"}):
        with (
            Stub([refusal(400)], info=info) as stub,
            RewardClient(stub.url) as client,
            pytest.raises(ServerError, match="expected a RewardRT server, found another"),
        ):
            client.score(text="a")


def test_patience_ends() -> None:
    with (
        Stub([refusal(503, message="full")]) as stub,
        RewardClient(stub.url, patience=0.5) as client,
        pytest.raises(ServerError, match=f"{stub.url}: 503, full"),
    ):
        client.score(text="a")
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with RewardClient(url, patience=0) as client, pytest.raises(ServerError, match="no answer"):
            client.score(text="a")


def test_an_answer_that_does_not_come_in_time_is_asked_for_again() -> None:
    def slow(body: Any) -> None:
        time.sleep(0.6)

    with with_good([slow]) as stub, RewardClient(stub.url, timeout=0.2, patience=20) as client:
        assert client.score_many(TEXTS).tolist() == REWARDS


def test_other_servers_are_asked_meanwhile() -> None:
    with with_good([]) as first, Stub([refusal(503, retry_after="60")]) as second, with_good([]) as third:
        with RewardClient([first.url, second.url, third.url], batch_rows=1, concurrency=4) as client:
            started_at = time.monotonic()
            assert client.score_many(TEXTS * 8).tolist() == REWARDS * 8
            assert time.monotonic() - started_at < 45  # nobody waited for the minute of the second
        assert len(first.requests) + len(third.requests) == 64
        assert min(len(first.requests), len(third.requests)) > 8
        assert 1 <= len(second.requests) <= 4


def test_two_servers_of_different_bundles_are_an_error() -> None:
    said = f"SHA-256 {'[56]' * 64}, and not .*which it, or another of the servers"
    with (
        with_good([]) as first,
        with_good([], sha256="6" * 64) as second,
        RewardClient([first.url, second.url], batch_rows=1) as client,
        pytest.raises(ServerError, match=said),
    ):
        client.score_many(TEXTS)


def test_a_bundle_that_changes_while_the_client_lives_is_an_error() -> None:
    with with_good([]) as stub, RewardClient(stub.url) as client:
        assert client.score(text="abcd") == 1
        stub.sha256 = "7" * 64
        with pytest.raises(ServerError, match="make a new client if that is right"):
            client.score(text="a")


def test_a_bundle_without_a_certificate_is_refused_where_one_is_wanted() -> None:
    with (
        with_good([]) as stub,
        RewardClient(stub.url, require_certificate=True) as client,
        pytest.raises(ServerError, match="serves a bundle without a certificate"),
    ):
        client.score(text="a")


def test_a_request_that_is_too_large_is_taken_apart() -> None:
    """A server that takes two rows at a time, and refuses one row as too large by itself."""

    def picky(body: Any) -> Answer:
        if len(body["rows"]) > 2:
            return refusal(400, "too_many", "too many texts")
        if any(len(row["text"]) == 5 for row in body["rows"]):
            return refusal(413, "too_large", "too large")
        return stub.good(body)

    stub = Stub([picky])
    with stub, RewardClient(stub.url) as client:
        found = client.score_rows(TEXTS)
    assert isinstance(found[4], RowError) and str(found[4]) == f"{stub.url}: 413, too large"
    assert [each.reward for each in found if not isinstance(each, RewardRTError | type(None))] == [  # type: ignore[union-attr]
        reward for index, reward in enumerate(REWARDS) if index != 4
    ]


def test_a_real_servers_limits_are_kept(offline: RewardModel) -> None:
    long = [{"text": f"{number} " + "word " * 60_000} for number in range(6)]
    limits = ["--max-items", "16", "--max-body-mb", "1", "--max-text-chars", "400000"]
    with serving(BUNDLE, *limits) as running, RewardClient(running.url) as client:
        assert client.score_many(ROWS[:100]).tobytes() == offline.score_many(ROWS[:100]).tobytes()
        answers = client.score_rows([{"prompt": "a", "responses": ["b"] * 17}, ROWS[0]])
        assert isinstance(answers[0], RowError) and "17 texts in one request; expected at most 16" in str(answers[0])
        assert not isinstance(answers[1], RewardRTError)
        found = client.score_rows(long)
    expected = offline.score_rows(long)
    assert [each.reward for each in found] == [each.reward for each in expected]  # type: ignore[union-attr]


def test_a_large_call_does_not_hold_up_a_small_one() -> None:
    def steady(body: Any) -> Answer:
        time.sleep(0.01)
        return stub.good(body)

    stub = Stub([steady])
    done: list[str] = []
    with stub, RewardClient(stub.url, batch_rows=4, concurrency=1) as client:

        def large() -> None:
            client.score_many(TEXTS * 25)
            done.append("large")

        thread = threading.Thread(target=large)
        thread.start()
        until(lambda: len(stub.requests) > 3)
        client.score(text="abc")
        done.append("small")
        thread.join(60)
    assert done == ["small", "large"]


def test_calls_with_other_options_are_not_put_together() -> None:
    with with_good([]) as stub, RewardClient(stub.url, batch_seconds=0.2) as client:

        async def both() -> Any:
            calls = [client.ascore(text="abc", normalize=flag) for flag in (None, True, None, False)]
            return await asyncio.gather(*calls)

        assert asyncio.run(both()) == [0.75] * 4
    asked = sorted((str(body.get("normalize")), len(body["rows"])) for body in stub.requests)
    assert asked == [("False", 1), ("None", 2), ("True", 1)]


def test_a_client_that_is_closed_fails_what_waits_and_can_be_used_again() -> None:
    gate = threading.Event()

    def held(body: Any) -> Answer:
        gate.wait(20)
        return stub.good(body)

    stub = Stub([held])
    with stub:
        client = RewardClient(stub.url)
        errors: list[BaseException] = []

        def wait() -> None:
            try:
                client.score(text="a")
            except ServerError as error:
                errors.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        until(lambda: stub.requests)
        client.close()
        thread.join(20)
        assert list(map(str, errors)) == ["the client was closed before the answer came"]
        gate.set()
        assert client.score(text="ab") == 0.5
        client.close()


def test_a_coroutine_that_is_cancelled_sends_no_more() -> None:
    def slow(body: Any) -> Answer:
        time.sleep(0.05)
        return stub.good(body)

    stub = Stub([slow])

    async def part(client: RewardClient) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(client.ascore_many(TEXTS * 50), 0.3)

    with stub, RewardClient(stub.url, batch_rows=1, concurrency=2) as client:
        asyncio.run(part(client))
        sent = len(stub.requests)
        time.sleep(0.3)
        assert sent <= len(stub.requests) <= sent + 4 < 100
        assert client.score(text="abcd") == 1


def test_a_pickled_client_is_the_same_in_other_processes(server: Running, offline: RewardModel) -> None:
    expected = offline.score_many(ROWS[:20]).tolist()
    with RewardClient(server.url, api_key="sesame") as client:
        assert client.score_many(ROWS[:20]).tolist() == expected
        with pickle.loads(pickle.dumps(client)) as copy:
            assert copy.score_many(ROWS[:20]).tolist() == expected
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.apply(_score_with, (client, ROWS[:20])) == expected


def _score_with(client: RewardClient, rows: list[dict[str, Any]]) -> list[float]:
    found: list[float] = client.score_many(rows).tolist()
    return found


FORK = """
import os, sys, threading, warnings
warnings.simplefilter("ignore")  # Python 3.12 warns of a fork beside threads, which is what is tested
from rewardrt import RewardClient
client = RewardClient(sys.argv[1], api_key="sesame")
rows = [{"text": f"text {number}"} for number in range(40)]
expected = client.score_many(rows).tolist()
stop = threading.Event()
busy = threading.Thread(target=lambda: [client.score_many(rows) for _ in iter(stop.is_set, True)])
busy.start()
children = []
for _ in range(4):
    child = os.fork()
    if child == 0:
        os._exit(0 if client.score_many(rows).tolist() == expected else 1)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
stop.set()
busy.join()
print(codes, client.score_many(rows).tolist() == expected)
"""


@pytest.mark.slow
def test_a_forked_process_connects_anew(server: Running) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK, server.url], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.returncode) == ("[0, 0, 0, 0] True\n", 0), done.stderr


WAITING = """
import sys
from rewardrt import RewardClient
client = RewardClient(sys.argv[1])
print("ready", flush=True)
try:
    client.score(text="a")
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.slow
def test_ctrl_c_ends_a_call_that_waits_and_the_process() -> None:
    with Stub([refusal(503)]) as stub:
        process = subprocess.Popen(
            [sys.executable, "-c", WAITING, stub.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        until(lambda: stub.requests)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=20)
    assert (said, errors, process.returncode) == ("ready\ninterrupted\n", "", 0)


@pytest.mark.slow
def test_a_server_that_is_killed_twice_loses_no_text(offline: RewardModel) -> None:
    """10,000 texts while the server is killed by SIGKILL and started again at the same port, twice."""
    rows = [{"text": f"text {number} {'and more ' * (number % 5)}"} for number in range(10_000)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found: list[Any] = []
    with RewardClient(f"http://127.0.0.1:{port}", batch_rows=32, patience=120) as client:
        thread = threading.Thread(target=lambda: found.append(client.score_many(rows)))
        for life in range(3):
            with serving(BUNDLE, port=port) as running:
                if life == 0:
                    thread.start()
                if life == 2:
                    thread.join(200)
                    break
                until(lambda log=running.log: sum("texts=32" in line for line in log) > 30)  # type: ignore[misc]
                running.process.kill()
                running.process.wait(30)
                assert not found
    assert np.array_equal(found[0], offline.score_many(rows))


def test_a_unix_socket_and_tls(offline: RewardModel, tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate, and it is not installed")
    cert, key, path = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "reward.sock"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    expected = offline.score(text="a")
    command = [sys.executable, "-c", "from rewardrt.cli.app import main; main()", "serve", str(BUNDLE)]
    environment = {name: value for name, value in os.environ.items() if name != "REWARDRT_API_KEY"}
    quietly: dict[str, Any] = {"stderr": subprocess.DEVNULL, "env": environment}
    with started([*command, "--uds", str(path)], **quietly), RewardClient(f"unix:{path}", patience=60) as client:
        assert client.score(text="a") == expected
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--tls-cert", str(cert), "--tls-key", str(key), "--port", str(port)]
    with started([*command, *options], **quietly):
        url = f"https://127.0.0.1:{port}"
        with RewardClient(url, patience=60, tls_ca=cert) as client:
            assert client.score(text="a") == expected
        with (
            RewardClient(url, patience=60) as client,
            pytest.raises(ServerError, match=r"TLS: self.signed certificate"),
        ):
            client.score(text="a")
