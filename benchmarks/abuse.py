"""What good clients of a server get while another one abuses it.

    python benchmarks/abuse.py BUNDLE [--seconds N] [--threads N] [--only NAME ...]

Six clients post one text each, again as soon as they are answered, while one abuse after another runs in a process of
its own against a fresh server. One line for each: how many of the good requests were answered with a reward, the
slowest of them, how much memory the server had above its start, and how late its event loop woke up. The first line is
without abuse. Then OpenRLHF's trainer: 512 posts at once, each tried five times, a second apart.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import gzip
import hashlib
import json
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from server_load import COMMAND, Client, resident

GOOD_CLIENTS = 6
TEXT = "a good client's text, of some twenty or thirty words, which says nothing that anybody would have to wait for. "
MEGABYTE = 10**6


async def _again(port: int, end: float, path: str, body: bytes, clients: int, headers: str = "") -> None:
    async def client() -> None:
        while time.monotonic() < end:
            connection = Client(port)
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, TypeError):
                while time.monotonic() < end:
                    await connection.post(path, body, headers)
            await connection.close()
            await asyncio.sleep(0.01)

    await asyncio.gather(*(client() for _ in range(clients)))


async def nothing(port: int, end: float) -> None:
    """No abuse."""


async def ids_past_64_bits(port: int, end: float) -> None:
    """Token ids that no array holds."""
    body = json.dumps({"input": [[1, 2**63]]}).encode()
    await _again(port, end, "/classify", body, 2)


async def kserve_shapes(port: int, end: float) -> None:
    """A shape of 10,500 numbers, whose product has a hundred thousand digits."""
    tensor = {"name": "text", "shape": [10**5] * 10_500, "datatype": "BYTES", "data": ["a"]}
    await _again(port, end, "/v2/models/m/infer", json.dumps({"inputs": [tensor]}).encode(), 2)


async def one_large_request(port: int, end: float) -> None:
    """1,024 texts, each longer than the model reads."""
    body = json.dumps({"query": ["word and " * 800] * 1024}).encode()
    await _again(port, end, "/get_reward", body, 1)


async def one_long_text(port: int, end: float) -> None:
    """A text of 8 MB, which is refused, and one of the most that is taken."""
    for size in (8 * MEGABYTE - 100, 262_000):
        body = json.dumps({"query": [("word and " * (size // 9))]}).encode()
        await _again(port, min(end, time.monotonic() + 3), "/get_reward", body, 2)


async def empty_rows(port: int, end: float) -> None:
    """8 MB of rows that hold nothing."""
    body = b'{"rows": [' + b"{}," * 2_700_000 + b"{}]}"
    await _again(port, end, "/v1/reward", body, 2)


async def many_items(port: int, end: float) -> None:
    """Two million texts of one letter."""
    body = b'{"query": ["' + b'a","' * 1_990_000 + b'a"]}'
    await _again(port, end, "/get_reward", body, 2)


async def never_read(port: int, end: float) -> None:
    """Clients that ask for large answers and read none."""
    rows = json.dumps({"rows": [{"text": "a", "more": "x" * 7000}] * 1000}).encode()
    connections = []
    for _ in range(6):
        connection = Client(port)
        connections.append(connection)
        with contextlib.suppress(OSError):
            await asyncio.wait_for(connection.send("/v1/reward", rows), 2)
            for _ in range(3):  # the next requests, before the first answer was read
                await asyncio.wait_for(connection.send("/v1/reward", rows), 2)
    await asyncio.sleep(max(0.0, end - time.monotonic()))


async def half_open(port: int, end: float) -> None:
    """44 connections that send half a header, or half a body, and wait."""
    halves = [
        b"POST /get_reward HTTP/1.1\r\nhost: a\r\n",
        b"POST /get_reward HTTP/1.1\r\nhost: a\r\ncontent-length: 99\r\n\r\n{",
    ]

    async def client(number: int) -> None:
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(halves[number % 2])
                await asyncio.wait_for(reader.read(), max(0.1, end - time.monotonic()))
                writer.close()
            await asyncio.sleep(0.5)

    await asyncio.gather(*(client(number) for number in range(44)))


async def panic(port: int, end: float) -> None:
    """A text at which the tokenizer panics."""
    await _again(port, end, "/get_reward", json.dumps({"query": ["caf\u00e9"]}).encode(), 2)


async def log_disk_full(port: int, end: float) -> None:
    """Nothing but a log that cannot be written."""
    await _again(port, end, "/get_reward", b'{"query": 1}', 1)


async def gzip_bomb(port: int, end: float) -> None:
    """8 MB that were a gigabyte."""
    bomb = gzip.compress(b"0" * 100 * MEGABYTE) * 10
    await _again(port, end, "/get_reward", bomb, 2, "content-encoding: gzip\r\n")


ABUSES: dict[str, Callable[[int, float], Awaitable[None]]] = {
    each.__name__: each
    for each in (
        nothing, ids_past_64_bits, kserve_shapes, one_large_request, one_long_text, empty_rows, many_items, never_read,
        half_open, panic, log_disk_full, gzip_bomb,
    )
}  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each abuse")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--only", nargs="*", choices=[*ABUSES, "openrlhf"], help="some of them")
    parser.add_argument("--be", nargs=2, metavar=("NAME", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be:
        name, port = options.be
        asyncio.run(ABUSES[name](int(port), time.monotonic() + options.seconds))
        return
    threads = [] if options.threads is None else ["--threads", str(options.threads)]
    print(
        f"{'':18} {'good requests':>13} {'served':>8} {'slowest':>8} {'memory':>8} {'loop late: p99':>15} {'most':>7}"
    )
    for name in options.only or ABUSES:
        if name in ABUSES:
            measure(options.bundle, name, options.seconds, threads)
    if not options.only or "openrlhf" in options.only:
        with serving(options.bundle, threads) as (port, _):
            asyncio.run(openrlhf(port))


def measure(bundle: Path, name: str, seconds: float, threads: list[str]) -> None:
    """Run one abuse beside good clients, and print its line."""
    with contextlib.ExitStack() as stack:
        if name == "panic":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            bundle = panicking(bundle, folder / "bundle")
        log = stack.enter_context(Path("/dev/full").open("wb")) if name == "log_disk_full" else None
        files = 48 if name == "half_open" else None
        port, pid = stack.enter_context(serving(bundle, threads, log=log, files=files))
        asyncio.run(good_clients(port, time.monotonic() + 1.0))
        before, late = resident(pid), lateness(port)
        abuser = subprocess.Popen(
            [sys.executable, __file__, bundle, "--seconds", str(seconds), "--be", name, str(port)],
        )
        answered, asked, slowest, most = asyncio.run(watched(port, pid, time.monotonic() + seconds))
        abuser.kill()
        abuser.wait()
        p99, worst = percentiles(late, lateness(port))
    print(
        f"{name:18} {asked:13} {answered / max(1, asked):8.2%} {slowest:6.2f} s {most - before:5.0f} MB "
        f"{p99 * 1e3:9.0f} ms {worst * 1e3:10.0f} ms",
        flush=True,
    )


async def watched(port: int, pid: int, end: float) -> tuple[int, int, float, float]:
    """Return what good clients got, and the most memory that the server had meanwhile."""
    most = 0.0

    async def watch() -> None:
        nonlocal most
        while time.monotonic() < end:
            most = max(most, resident(pid))
            await asyncio.sleep(0.05)

    (answered, asked, slowest), _ = await asyncio.gather(good_clients(port, end), watch())
    return answered, asked, slowest, most


async def good_clients(port: int, end: float) -> tuple[int, int, float]:
    """Return how many requests were answered with a reward, how many there were, and the slowest one's seconds."""
    seconds: list[float] = []
    good = 0

    async def client(number: int) -> None:
        nonlocal good
        connection = Client(port)
        body = json.dumps({"query": [f"{number} {TEXT}"]}).encode()
        while time.monotonic() < end:
            began = time.perf_counter()
            try:
                status, answer = await asyncio.wait_for(connection.post("/get_reward", body), 60)
                good += status == 200 and len(json.loads(answer)["rewards"]) == 1
            except (OSError, asyncio.IncompleteReadError):
                await connection.close()
            seconds.append(time.perf_counter() - began)
        await connection.close()

    await asyncio.gather(*(client(number) for number in range(GOOD_CLIENTS)))
    return good, len(seconds), max(seconds, default=0.0)


async def openrlhf(port: int, posts: int = 512) -> None:
    """Post as its trainer does, and print how many rewards were lost."""
    lost = retried = 0
    began = time.perf_counter()

    async def post(number: int) -> None:
        nonlocal lost, retried
        body = json.dumps({"query": [f"{number} " + TEXT * 30], "prompts": ["p"], "labels": ["l"]}).encode()
        for _ in range(5):
            connection = Client(port)
            try:
                status, _ = await asyncio.wait_for(connection.post("/get_reward", body), 180)
                if status == 200:
                    return
            except (OSError, asyncio.IncompleteReadError):
                pass
            finally:
                await connection.close()
            retried += 1
            await asyncio.sleep(1)
        lost += 1

    await asyncio.gather(*(post(number) for number in range(posts)))
    seconds = time.perf_counter() - began
    print(f"OpenRLHF: {posts} posts at once, {lost} rewards lost, {retried} tries again, {seconds:.1f} s")


@contextlib.contextmanager
def serving(
    bundle: Path, threads: list[str], *, log: Any = None, files: int | None = None
) -> Iterator[tuple[int, int]]:
    """Serve a bundle until the block ends; gives the port and the process."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]

    def limit() -> None:
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    server = subprocess.Popen(
        [*COMMAND, "serve", bundle, "--served-name", "m", "--port", str(port), *threads],
        stderr=log or subprocess.DEVNULL,
        preexec_fn=limit,  # noqa: PLW1509 - no threads here
    )
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).close()
                break
            time.sleep(0.05)
        yield port, server.pid
    finally:
        server.kill()
        server.wait()


def lateness(port: int) -> dict[float, float]:
    """Return the server's own account of its event loop: how often it was at most so many seconds late."""
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()
    found = re.findall(r'rewardrt_loop_lag_seconds_bucket\{le="([^"]+)"\} ([\d.e+]+)', page)
    return {float(bound.replace("+Inf", "inf")): float(count) for bound, count in found}


def percentiles(before: dict[float, float], after: dict[float, float]) -> tuple[float, float]:
    """Return the bounds under which 99% and all of what was counted in between lie."""
    counts = {bound: after[bound] - before[bound] for bound in after}
    total = counts[float("inf")]
    return (
        min(bound for bound, count in counts.items() if count >= 0.99 * total),
        min(bound for bound, count in counts.items() if count >= total),
    )


def panicking(bundle: Path, target: Path) -> Path:
    """Copy a bundle, and give its tokenizer a normalizer that panics at what is not ASCII."""
    shutil.copytree(bundle, target)
    data = json.loads((target / "tokenizer.json").read_text())
    # A table of 128 empty entries, which SentencePiece's normalizer looks up by byte.
    table = (128 * 4).to_bytes(4, "little") + bytes(128 * 4)
    charsmap = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
    before = [data["normalizer"]] if data["normalizer"] else []
    data["normalizer"] = {"type": "Sequence", "normalizers": [charsmap, *before]}
    written = json.dumps(data).encode()
    (target / "tokenizer.json").write_bytes(written)
    manifest = json.loads((target / "reward.json").read_text())
    for record in manifest["files"]:
        if record["path"] == "tokenizer.json":
            record |= {"sha256": hashlib.sha256(written).hexdigest(), "bytes": len(written)}
    (target / "reward.json").write_text(json.dumps(manifest))
    return target


if __name__ == "__main__":
    main()
