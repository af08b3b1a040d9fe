"""What a request may cost: looked at before it is paid, in bounded time and memory, whoever asks."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gzip
import json
import re
import resource
import signal
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from rewardrt import RewardModel
from rewardrt.data.strict_json import Bounds, read_json
from rewardrt.errors import RowError
from server_process import Running, serving


@pytest.fixture
def connect() -> Iterator[Callable[[Running], socket.socket]]:
    """Opens connections, which are closed after the test."""
    with contextlib.ExitStack() as stack:

        def open_one(server: Running) -> socket.socket:
            host, port = server.url.removeprefix("http://").split(":")
            return stack.enter_context(socket.create_connection((host, int(port)), timeout=30))

        yield open_one


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Running]:
    limits = ("--header-seconds", 1, "--body-seconds", 1, "--write-seconds", 1, "--served-name", "m")
    with serving(tiny_bundle, *limits) as running:
        yield running


def post(server: Running, path: str, body: object, **headers: str) -> httpx.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{server.url}{path}", content=data, headers=headers, timeout=60)


Connect = Callable[[Running], socket.socket]


def read_all(connection: socket.socket) -> bytes:
    data = b""
    while part := connection.recv(65536):  # bounded: connections of `connect` have a timeout of 30 s
        data += part
    return data


def resident(server: Running) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**400, -1, 1e300, 2**64])
@pytest.mark.parametrize("path", ["/classify", "/v1/classify", "/pooling", "/v1/embeddings", "/v2/models/m/infer"])
def test_a_token_id_of_any_size_is_a_400(server: Running, path: str, value: float) -> None:
    tensors = {"tokens": [1, value], "sequence_lengths": [2]}
    inputs = [
        {"name": name, "shape": [1, len(data)], "datatype": "INT64", "data": data} for name, data in tensors.items()
    ]
    answer = post(server, path, {"inputs": inputs} if "infer" in path else {"input": [[1, value]]})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert "expected 0 to" in (error if isinstance(error, str) else error["message"])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([10**5] * 10_500, "inputs[0].shape: expected at most 4 items, found 10500"),
        ([2**31, 2**31, 2**31, 2**31], "expected at most 1024"),
        ([10**400], "inputs[0].shape[0]: expected at most 2147483648, found 1"),
        ([1e300], "inputs[0].shape[0]: expected at most 2147483648, found 1e+300"),
        ([2], "inputs: text has shape [2] and 1 elements"),
    ],
)
def test_a_shape_is_bounded_before_it_is_multiplied(server: Running, shape: list[int], message: str) -> None:
    tensor = {"name": "text", "shape": shape, "datatype": "BYTES", "data": ["a"]}
    started = time.monotonic()
    answer = post(server, "/v2/models/m/infer", {"inputs": [tensor]})
    assert answer.status_code == 400
    assert message in answer.json()["error"]  # a string, as KServe's clients read it
    assert time.monotonic() - started < 5


def test_binary_elements_are_counted_before_they_are_read(server: Running) -> None:
    data = b"\0\0\0\0" * 1_500_000
    tensor = {"name": "text", "shape": [1_500_000], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    answer = post(server, "/v2/models/m/infer", head + data, **{"inference-header-content-length": str(len(head))})
    assert (answer.status_code, answer.json()) == (
        400,
        {"error": "inputs: text has 1500000 elements; expected at most 1024"},
    )


@pytest.mark.parametrize("size", ["²", "-1", "9" * 5000, "1e3"])
def test_a_header_length_that_is_no_number_is_a_400(server: Running, size: str) -> None:
    headers = {"inference-header-content-length": size.encode()}
    answer = httpx.post(f"{server.url}/v2/models/m/infer", content=b"{}", headers=headers)  # type: ignore[arg-type]
    assert answer.status_code == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/reward", b'{"rows": [' + b"{}," * 2_700_000 + b"{}]}"),
        ("/v1/reward", b'{"rows": [' + b"{}," * 1024 + b"{}]}"),
        ("/v1/reward", b'{"rows": [{"prompt": "q", "responses": ["' + b'a","' * 1024 + b'a"]}]}'),
        ("/get_reward", b'{"query": ["' + b'a","' * 1_990_000 + b'a"]}'),
        ("/get_reward", b'{"query": [], "labels": [' + b"1," * 4_000_000 + b"1]}"),
        ("/classify", b'{"input": [' + b"[1]," * 1_900_000 + b"[1]]}"),
        ("/remote_rm", b'{"response": "a", "prompt": [' + b"{}," * 2_700_000 + b"{}]}"),
        ("/v1/score/evaluation", b'{"model": "model", "messages": ["' + b'a","' * 1_990_000 + b'a"]}'),
        ("/v1/score/evaluation", b'{"model": "model", "messages": ["' + b'a","' * 1024 + b'a"]}'),
        ("/v1/chat/completions", b'{"messages": [' + b"{}," * 2_700_000 + b"{}]}"),
        (
            "/v2/models/m/infer",
            b'{"inputs": [{"name": "tokens", "datatype": "INT64", "shape": [2000000, 1], "data": ['
            + b"1," * 1_999_999
            + b"1]}]}",
        ),
        (
            "/v2/models/m/infer",
            b'{"inputs": [{"name": "tokens", "datatype": "INT64", "shape": [1025, 1000], "data": ['
            + b"1," * 1_024_999
            + b"1]}]}",
        ),
        ("/predict", b'{"inputs": [["' + b'a"],["' * 1024 + b'a"]]}'),
        ("/score", b'{"queries": "q", "documents": ["' + b'a","' * 1024 + b'a"]}'),
        ("/v2/rerank", b'{"model": "m", "query": "q", "documents": ["' + b'a","' * 1024 + b'a"]}'),
    ],
)
def test_too_many_values_are_refused_whatever_they_are_in_little_time_and_few_bytes(
    server: Running, path: str, body: bytes
) -> None:
    before, started = resident(server), time.monotonic()
    answer = post(server, path, body)
    assert answer.status_code in (400, 422)
    assert len(answer.content) < 1000
    assert time.monotonic() - started < 5
    assert resident(server) - before < 150


@pytest.mark.parametrize(
    "data",
    [b'{"text": 1e999}', b'{"text": "a", "x": -1e999}', b'{"text": NaN}', b'{"text": "a", "x": ' + b"9" * 5000 + b"}"],
)
def test_a_number_that_json_cannot_carry_is_a_400_where_a_file_has_an_error_row(server: Running, data: bytes) -> None:
    answer = post(server, "/v1/reward", b'{"rows": [' + data + b"]}")
    with pytest.raises(RowError) as refused:
        read_json(data)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, f"body: {refused.value}")


@pytest.mark.parametrize("levels", [100, 129, 400, 962, 5000, 100_000])
def test_levels_of_nesting_are_a_400_or_scored_never_a_500(server: Running, levels: int) -> None:
    row = b'{"text": "a", "kept": ' + b"[" * levels + b"]" * levels + b"}"
    answer = post(server, "/v1/reward", b'{"rows": [' + row + b"]}")
    assert answer.status_code == (200 if levels == 100 else 400)


def test_the_reader_counts_outside_of_strings_and_ends_where_a_string_does_not() -> None:
    bounds = Bounds(nodes=4, numbers=0)
    assert read_json(b'{"a": "[[[[[[,,,,,,\\\\\\"{{{"}', bounds) == {"a": '[[[[[[,,,,,,\\"{{{'}
    with pytest.raises(RowError, match="too many values"):
        read_json(b'{"a": ["b", "c", "d"]}', bounds)
    started = time.monotonic()
    with pytest.raises(RowError, match="not JSON"):
        read_json(b'{"' + b'\\"' * 3_000_000, bounds)
    assert time.monotonic() - started < 10


def test_a_text_of_many_characters_is_its_own_error(server: Running, tiny_bundle: Path) -> None:
    rows = [{"text": "a" * 300_000}, {"text": "fine"}, {"prompt": "b" * 300_000, "response": "c"}]
    found = post(server, "/v1/reward", {"rows": rows}).json()["rows"]
    assert found[0]["error"] == "the text has 300000 characters; expected at most 262144: shorten it"
    assert "reward" in found[1]
    assert "expected at most 262144" in found[2]["error"]


def test_a_long_text_is_cut_as_it_is_offline(server: Running, tiny_bundle: Path) -> None:
    text = "words and more " * 15_000
    (scored,) = RewardModel.load(tiny_bundle).score_rows([{"text": text}])
    (found,) = post(server, "/v1/reward", {"rows": [{"text": text}]}).json()["rows"]
    assert (found["reward"], found["truncated"]) == (float(str(np.float32(scored.reward))), scored.truncated)  # type: ignore[union-attr]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "x-gzip"])
def test_a_compressed_body_is_scored(server: Running, encoding: str) -> None:
    data = json.dumps({"query": ["a"] * 100}).encode()
    packed = (
        zlib.compress(data)
        if encoding == "deflate"
        else gzip.compress(data[:50], mtime=0) + gzip.compress(data[50:], mtime=0)
    )
    answer = post(server, "/get_reward", packed, **{"content-encoding": encoding})
    assert len(answer.json()["rewards"]) == 100


@pytest.mark.parametrize(
    ("data", "encoding", "status"),
    [
        (gzip.compress(b"0" * 500_000_000, 1, mtime=0), "gzip", 413),
        (gzip.compress(b"0" * 4_000_000, mtime=0) * 3, "gzip", 413),
        (gzip.compress(b"{}", mtime=0)[:-4], "gzip", 400),
        (gzip.compress(b"{}", mtime=0) + b"more", "gzip", 400),
        (b"{}", "gzip", 400),
        (b"{}", "br", 415),
    ],
)
def test_a_compressed_body_is_unpacked_up_to_the_limit(
    server: Running, data: bytes, encoding: str, status: int
) -> None:
    before = resident(server)
    assert post(server, "/get_reward", data, **{"content-encoding": encoding}).status_code == status
    assert resident(server) - before < 60


def test_half_a_header_and_half_a_body_are_ended_in_time(server: Running, connect: Connect) -> None:
    halves = {
        b"POST /get_reward HTTP/1.1\r\nhost: a\r\n": b"408",
        b"": b"",
        b"POST /get_reward HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 9\r\n\r\n{": b"408",
    }
    opened = [(connect(server), half, answer) for half, answer in halves.items()]
    started = time.monotonic()
    for connection, half, _ in opened:
        connection.sendall(half)
    for connection, _, answer in opened:
        assert answer in read_all(connection)[:20]
    assert time.monotonic() - started < 6
    assert "error='the header did not come in time'" in server.wait_for(" 408 protocol=- ")
    assert "within 1 seconds" in server.wait_for("POST /get_reward 408 protocol=openrlhf")


def test_a_client_that_does_not_read_is_cut_off_and_its_memory_is_free(server: Running, connect: Connect) -> None:
    rows = json.dumps({"rows": [{"text": "a", "more": "x" * 7000}] * 1000}).encode()
    head = f"POST /v1/reward HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(rows)}\r\n\r\n".encode()
    before = resident(server)
    opened = [connect(server) for _ in range(6)]
    for connection in opened:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # so many at once are too many of one client
            connection.sendall(head + rows)
    time.sleep(2.5)
    assert post(server, "/get_reward", {"query": ["a"]}).status_code == 200
    assert post(server, "/v1/reward", rows).status_code == 200  # a large one, too: nothing is held any more
    assert resident(server) - before < 250


def test_small_chunks_and_long_headers_are_refused(server: Running, connect: Connect) -> None:
    head = b"POST /get_reward HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    for data in (
        head + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 40_000,
        head + b"a: b\r\n" * 40_000 + b"\r\n",
        b"\x16\x03\x01 no http\r\n\r\n",
    ):
        connection = connect(server)
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(data)
            answer = read_all(connection)
            assert b" 400 " in answer.split(b"\r\n")[0]
    assert "error='malformed HTTP'" in server.wait_for("- - 400 protocol=-")


def test_forty_four_half_open_connections_lock_nobody_out_at_48_files(tiny_bundle: Path, connect: Connect) -> None:
    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))

    with serving(tiny_bundle, limit=few_files) as running:
        opened = []
        for number in range(44):
            opened.append(connect(running))
            opened[-1].sendall(b"POST /get_reward HTTP/1.1\r\n" if number % 2 else b"G")
        with httpx.Client(headers={"connection": "close"}) as client:
            for _ in range(10):
                started = time.monotonic()
                assert client.post(f"{running.url}/get_reward", json={"query": ["a"]}).status_code == 200
                assert time.monotonic() - started < 3
        assert running.wait_for("connections: this process may open few files")
        started = time.monotonic()
        assert running.stop() == 0  # although they are all still open
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_server_drains_within_its_deadline_whatever_clients_do(tiny_bundle: Path, sig: int, connect: Connect) -> None:
    rows = json.dumps({"rows": [{"text": "a", "more": "x" * 7000}] * 1000}).encode()
    head = f"POST /v1/reward HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(rows)}\r\n\r\n".encode()
    with serving(tiny_bundle, "--drain-seconds", 2) as running:
        opened = [connect(running) for _ in range(4)]
        opened[0].sendall(head[:30])
        opened[1].sendall(head + rows[:5])
        opened[2].sendall(head + rows)  # and never reads
        with concurrent.futures.ThreadPoolExecutor(1) as client:
            answered = client.submit(post, running, "/get_reward", {"query": ["a text"]})
            assert answered.result(60).status_code == 200
        started = time.monotonic()
        assert running.stop(sig) == 0
        assert time.monotonic() - started < 5
