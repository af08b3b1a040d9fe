"""Who may ask and from where, what the log and the metrics say of it, and a new bundle without a restart."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import commands
from rewardrt import RewardModel
from rewardrt.server.log import Record, quoted
from server_process import Running, serving


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Running]:
    with serving(tiny_bundle, "--log-texts") as running:
        yield running


def post(server: Running, path: str, body: object, **headers: str) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=60)


def raw(server: Running, data: bytes) -> bytes:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(data)
        return connection.recv(65536)


@pytest.mark.parametrize("key", ["", " ", " sesame", "sesame\n", "s\u00e9same", "ses\tame", "\u200b"])
def test_a_key_that_guards_nothing_or_that_no_client_can_send_is_refused_at_the_start(
    tiny_bundle: Path, tmp_path: Path, key: str
) -> None:
    (tmp_path / "keys").write_bytes(key.encode() if key == "" else f"good\n{key.strip(chr(10))} \n".encode())
    done = [
        commands.run("serve", tiny_bundle, "--api-key", key),
        commands.run("serve", tiny_bundle, "--api-key-file", tmp_path / "keys"),
    ]
    environment = os.environ | {"REWARDRT_API_KEY": key, "PYTHONUTF8": "1"}
    program = [sys.executable, "-c", "from rewardrt.cli.app import main; main()", "serve", str(tiny_bundle)]
    done.append(subprocess.run(program, capture_output=True, text=True, env=environment, check=False, timeout=60))
    assert [each.returncode for each in done] == [2, 2, 2]
    assert all(each.stderr.startswith("error: ") and each.stderr.count("\n") == 1 for each in done)


def test_a_file_of_keys_has_one_for_each_client(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    with serving(tiny_bundle, "--api-key-file", tmp_path / "keys") as running:
        found = [
            post(running, "/get_reward", {"query": ["a"]}, **{"x-api-key": key}).status_code
            for key in ("one", "two", "three", "")
        ]
    assert found == [200, 200, 401, 401]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "evil.example", "origin": "http://evil.example"}, 403),  # a name made an address of this machine
        ({"host": "evil.example"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "Multipart/Form-Data; boundary=x"}, 415),
        ({"host": "localhost:5000", "origin": "http://localhost:5000"}, 200),
        ({"host": "127.0.0.1:80", "origin": "http://127.0.0.1:80"}, 200),
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({}, 200),
    ],
)
def test_a_page_of_another_site_cannot_post(server: Running, headers: dict[str, str], status: int) -> None:
    answer = httpx.post(f"{server.url}/get_reward", content=b'{"query": ["a"]}', headers=headers)
    assert answer.status_code == status


def test_a_name_that_is_allowed_is_taken_and_others_are_not(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--allow-host", "rewards.example.org") as running:
        for host, origin, status in (
            ("rewards.example.org", "https://rewards.example.org", 200),
            ("127.0.0.1:9", "https://rewards.example.org", 200),
            ("other.example.org", None, 403),
        ):
            headers = {"host": host} | ({"origin": origin} if origin else {})
            assert post(running, "/get_reward", {"query": ["a"]}, **headers).status_code == status


def test_no_path_is_redirected_and_what_is_not_served_is_logged_and_counted(server: Running) -> None:
    def counted() -> dict[str, float]:
        page = httpx.get(f"{server.url}/metrics").text
        return {
            name: sum(map(float, re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", page, re.M)))
            for name in (
                "rewardrt_requests_total", "rewardrt_errors_total", "rewardrt_clients_gone_total", "rewardrt_request_seconds_count",
            )
        }  # fmt: skip

    before = counted()
    assert post(server, "/v1/reward/", {}).status_code == 404
    assert httpx.get(f"{server.url}/get_reward").status_code == 405
    assert (
        httpx.get(f"{server.url}/v2/models/none/here")
        .json()["error"]
        .startswith("GET /v2/models/none/here: not served")
    )
    assert b" 400 " in raw(server, b"no http\r\n\r\n")
    assert post(server, "/get_reward", {"query": 1}).status_code == 400
    assert post(server, "/get_reward", {"query": ["a"]}).status_code == 200
    after = counted()
    found = {name: after[name] - before[name] for name in after}
    assert found == {
        "rewardrt_requests_total": 7,  # and the metrics themselves
        "rewardrt_errors_total": 5,
        "rewardrt_clients_gone_total": 0,
        "rewardrt_request_seconds_count": 7,
    }
    for line in ("POST /v1/reward/ 404", "GET /get_reward 405", "- - 400 "):
        assert server.wait_for(line)


def test_a_line_of_the_log_cannot_be_forged(server: Running) -> None:
    forged = "2026-01-01T00:00:00Z POST /v1/reward 200 protocol=x"
    raw(
        server,
        b"GET /%0A"
        + forged.replace(" ", "%20").encode()
        + b"%1B%5B2J\"' HTTP/1.1\r\nhost: 127.0.0.1\r\nx-forwarded-for: 9.9.9.9\r\n\r\n",
    )
    post(server, "/v1/reward", {"rows": [], "model": f"\n{forged}\x1b[2J\u202e\u2028"})
    server.wait_for("is not served here")
    assert not any(
        line.startswith(forged) or "\x1b" in line or "\u202e" in line or "9.9.9.9" in line for line in server.log
    )
    assert quoted("a\nb") == r"'a\nb'"
    assert " path=x" not in Record("GET", "/ path=x", "\x1b").line().replace("'/ path=x'", "")


@pytest.mark.parametrize("data", [b"{", b'{"query": 1}', b"\xff\xfe", b'{"query": ["logged"]}'])
def test_texts_are_logged_of_refused_bodies_as_well(server: Running, data: bytes) -> None:
    status = httpx.post(f"{server.url}/get_reward", content=data).status_code
    assert status == (200 if b"logged" in data else 400)
    assert server.wait_for(f"body={data.decode('utf-8', 'backslashreplace')!r}")


def test_a_log_that_cannot_be_written_or_is_not_read_stops_no_scoring(tiny_bundle: Path) -> None:
    program = [sys.executable, "-c", "from rewardrt.cli.app import main; main()", "serve", str(tiny_bundle)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    reader, writer = os.pipe()
    with Path("/dev/full").open("wb") as full, os.fdopen(writer, "wb") as pipe, os.fdopen(reader, "rb"):
        for log in (full, pipe):
            process = subprocess.Popen([*program, "--port", port, "--log-texts"], stderr=log)
            try:
                for _ in range(500):
                    try:
                        httpx.get(f"http://127.0.0.1:{port}/ready")
                        break
                    except httpx.TransportError:
                        time.sleep(0.05)
                with httpx.Client() as client:
                    for index in range(20):
                        body = {"query": ["word " * 1000 + str(index)]}
                        assert client.post(f"http://127.0.0.1:{port}/get_reward", json=body).status_code == 200
                process.terminate()
                assert process.wait(10) == 0
            finally:
                process.kill()
                process.wait(30)


def test_forwarded_headers_are_believed_of_named_proxies_only(tiny_bundle: Path) -> None:
    with serving(tiny_bundle, "--forwarded-allow-ips", "127.0.0.1", "--root-path", "/rewards") as running:
        post(running, "/get_reward", {"query": ["a"]}, **{"x-forwarded-for": "9.9.9.9"})
        assert running.wait_for("client=9.9.9.9")
        post(running, "/get_reward", {"query": ["a"]}, **{"x-forwarded-for": "\x1b[2J x=y"})
        assert running.wait_for(r"client='\x1b[2J x=y'")
        ranked = post(running, "/v2/rerank", {"model": "m", "query": "q", "documents": ["d"]}).json()
        assert ranked["meta"]["api_version"]["version"] == "2"


def test_a_unix_socket_is_taken_over_from_nobody_and_left_to_who_listens(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    program = [
        sys.executable,
        "-c",
        "from rewardrt.cli.app import main; main()",
        "serve",
        str(tiny_bundle),
        "--uds",
        str(path),
    ]
    for _ in range(2):  # after a kill the path is still there
        process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        try:
            assert next(line for line in process.stderr if line.startswith("serving ")).split()[3] == f"unix:{path}"
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://rewards") as client:
                assert client.post("/get_reward", json={"query": ["a"]}).status_code == 200
                assert path.stat().st_mode & 0o777 == 0o660
                second = commands.run("serve", tiny_bundle, "--uds", path)
                assert (second.returncode, "another server listens there" in second.stderr) == (2, True)
        finally:
            process.kill()
            process.wait(30)
            process.stderr.close()
    (tmp_path / "file").write_text("kept")
    assert commands.run("serve", tiny_bundle, "--uds", tmp_path / "file").returncode == 2
    assert (tmp_path / "file").read_text() == "kept"


def test_https_is_served_with_a_certificate_and_refused_without_a_good_one(tiny_bundle: Path, tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make a certificate with")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    program = [
        sys.executable,
        "-c",
        "from rewardrt.cli.app import main; main()",
        "serve",
        str(tiny_bundle),
        "--port",
        "0",
    ]
    process = subprocess.Popen(
        [*program, "--tls-cert", str(cert), "--tls-key", str(key)], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        url = next(line for line in process.stderr if line.startswith("serving ")).split(" at ")[1].split()[0]
        assert url.startswith("https://")
        answer = httpx.post(
            f"{url}/get_reward", json={"query": ["a"]}, verify=ssl.create_default_context(cafile=str(cert))
        )
        assert answer.status_code == 200
    finally:
        process.kill()
        process.wait(30)
        process.stderr.close()  # type: ignore[union-attr]
    refused = commands.run("serve", tiny_bundle, "--tls-cert", key, "--tls-key", cert)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


def test_a_bundle_is_loaded_anew_under_load_and_each_answer_is_of_one(tiny_bundle: Path, tmp_path: Path) -> None:
    other, link = tmp_path / "other", tmp_path / "served"
    shutil.copytree(tiny_bundle, other)
    manifest = json.loads((other / "reward.json").read_text())
    manifest["spec"]["max_length"] = 12  # another bundle: the same text has another reward
    (other / "reward.json").write_text(json.dumps(manifest))
    link.symlink_to(tiny_bundle)
    text = "many words in one text that are cut by one of the two, which makes its reward another one"
    expected: dict[str, Any] = {}

    def point(target: Path) -> None:
        (tmp_path / "new").symlink_to(target)
        (tmp_path / "new").rename(link)

    with serving(link, "--api-key", "sesame") as running:
        headers = {"x-api-key": "sesame"}

        def ask(client: httpx.Client) -> tuple[str, float]:
            answer = client.post(f"{running.url}/get_reward", json={"query": [text]}, headers=headers)
            assert answer.status_code == 200
            return answer.headers["x-rewardrt-bundle"], answer.json()["rewards"][0]

        def load() -> list[tuple[str, float]]:
            with httpx.Client(timeout=60) as client:
                found = []
                while not done:
                    found.append(ask(client))
                return found

        done: list[bool] = []
        memory = []
        with concurrent.futures.ThreadPoolExecutor(4) as clients, httpx.Client(timeout=120) as client:
            asked = [clients.submit(load) for _ in range(4)]
            for round_number in range(6):
                target = other if round_number % 2 == 0 else tiny_bundle
                point(target)
                answer = client.post(f"{running.url}/v1/reload", headers=headers)
                assert answer.status_code == 200
                sha256, reward = ask(client)
                assert answer.json()["models"][0]["sha256"] == sha256
                assert expected.setdefault(sha256, reward) == reward
                status = Path(f"/proc/{running.process.pid}/status").read_text()
                memory.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024)  # type: ignore[index]
            done.append(True)
            found = [each for future in asked for each in future.result(60)]
        assert len(expected) == 2
        assert len(set(expected.values())) == 2
        assert expected[httpx.get(f"{running.url}/health").json()["models"][0]["sha256"]] == pytest.approx(
            RewardModel.load(tiny_bundle).score(text=text)
        )
        assert {each: expected[each[0]] for each in found} == {each: each[1] for each in found}
        assert memory[-1] - memory[1] < 60


def test_a_bundle_that_cannot_be_loaded_anew_leaves_the_old_one_served(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    with serving(bundle, "--api-key", "sesame") as running:
        headers = {"x-api-key": "sesame"}
        before = post(running, "/get_reward", {"query": ["a"]}, **headers).json()
        (bundle / "tokenizer.json").rename(bundle / "old.json")
        (bundle / "tokenizer.json").write_text("{}")
        answer = httpx.post(f"{running.url}/v1/reload", headers=headers, timeout=60)
        assert answer.status_code == 500
        assert "the old bundles are served on" in answer.json()["error"]["message"]
        running.process.send_signal(signal.SIGUSR1)
        assert running.wait_for("error: the bundles were not loaded anew")
        assert post(running, "/get_reward", {"query": ["a"]}, **headers).json() == before


def test_without_a_key_only_the_operator_can_load_anew(tiny_bundle: Path) -> None:
    with serving(tiny_bundle) as running:
        assert httpx.post(f"{running.url}/v1/reload").status_code == 403
        running.process.send_signal(signal.SIGUSR1)
        assert running.wait_for("loaded anew in ")
