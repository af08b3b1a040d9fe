"""A server under load, against `rewardrt score` on the same texts.

    python benchmarks/server_load.py BUNDLE INPUT.jsonl [--texts N] [--clients N] [--soak SECONDS] [--threads N]

Without --soak: closed-loop clients post one text each to OpenRLHF's route, as often as they are answered; every reward
is compared with the offline one, bit for bit. With --soak: good requests, bad ones, clients that go away and more than
the queue holds, mixed, while the server's memory is watched.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from rewardrt import RewardModel, RowError, Scored

COMMAND = [sys.executable, "-c", "from rewardrt.cli.app import main; main()"]


class Client:
    """One connection that stays open; as little work as a client can do, because it shares the machine."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def post(self, path: str, body: bytes, headers: str = "") -> tuple[int, bytes]:
        """Return the status and body of the answer."""
        await self.send(path, body, headers)
        assert self._reader is not None
        head = await self._reader.readuntil(b"\r\n\r\n")
        size = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
        answer = await self._reader.readexactly(size)
        if b"connection: close" in head:
            await self.close()
        return int(head[9:12]), answer

    async def send(self, path: str, body: bytes, headers: str = "") -> None:
        """Post and do not wait for the answer."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
        self._writer.write(head.encode() + body)
        await self._writer.drain()

    async def close(self) -> None:
        """Go away."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--soak", type=float, default=0.0, help="seconds of mixed traffic")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    model = RewardModel.load(options.bundle, threads=options.threads)
    texts = read_texts(model, options.file, options.texts)
    expected = model.score_many([{"text": text} for text in texts])
    tokens = sum(row.tokens for row in model.score_rows([{"text": text} for text in texts]) if isinstance(row, Scored))
    weights = sum(record.bytes for record in model.bundle.manifest.files if record.path.endswith(".data"))
    del model
    threads = [] if options.threads is None else ["--threads", str(options.threads)]
    print(f"{len(texts)} texts, {tokens} tokens, {options.clients} clients")
    if not options.soak:
        print(f"rewardrt score        {offline_rate(options.bundle, texts, threads):9.0f} tokens/s")
    limit = ["--max-queue-tokens", "20000"] if options.soak else []
    started = time.perf_counter()
    server = subprocess.Popen(
        [*COMMAND, "serve", options.bundle, "--port", "0", *threads, *limit], stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stderr is not None
        port = 0
        while not port:
            found = re.search(r"at http://[\d.]+:(\d+)", server.stderr.readline())
            port = int(found[1]) if found else 0
        print(f"started in {time.perf_counter() - started:.2f} s, {resident(server.pid):.0f} MB resident "
              f"({weights / 1e6:.0f} MB of weights)")  # fmt: skip
        drain = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        if options.soak:
            asyncio.run(soak(port, server.pid, texts, expected, options.clients, options.soak))
        else:
            asyncio.run(closed_loop(port, server.pid, texts, expected, options.clients, tokens))
        print(f"{resident(server.pid):.0f} MB resident at the end")
        server.terminate()
        print(f"exit status {server.wait(60)} after SIGTERM")
        drain.wait()
    finally:
        server.kill()


def read_texts(model: RewardModel, path: Path, count: int) -> list[str]:
    """Return the rendered texts of a file's rows, in their order."""
    texts: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = model.answers.parse(json.loads(line))
        except RowError:
            continue
        texts += [model.answers.renderer.render(item).text for item in row.items]
        if len(texts) >= count:
            break
    return texts[:count]


def offline_rate(bundle: Path, texts: list[str], threads: list[str]) -> float:
    """Return the tokens/s that `rewardrt score` says."""
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    done = subprocess.run(
        [*COMMAND, "score", bundle, "-", *threads], input=data, capture_output=True, text=True, check=True
    )
    return float(re.search(r"\((\d+) tokens/s\)", done.stderr)[1])  # type: ignore[index]


async def closed_loop(port: int, pid: int, texts: list[str], expected: np.ndarray, count: int, tokens: int) -> None:
    """Post every text once, `count` at a time, and print what came back and how fast."""
    bodies = [json.dumps({"query": [text], "prompts": [], "labels": []}).encode() for text in texts]
    waiting = iter(range(len(texts)))
    rewards = np.full(len(texts), np.nan, dtype=np.float32)
    seconds: list[float] = []

    async def client() -> None:
        connection = Client(port)
        for index in waiting:
            started = time.perf_counter()
            status, answer = await connection.post("/get_reward", bodies[index])
            seconds.append(time.perf_counter() - started)
            assert status == 200, answer
            rewards[index] = json.loads(answer)["rewards"][0]
        await connection.close()

    before, began = cpu_seconds(pid), time.perf_counter()
    await asyncio.gather(*(client() for _ in range(count)))
    wall = time.perf_counter() - began
    same = int((rewards.view(np.int32) == expected.view(np.int32)).sum())
    ordered = sorted(seconds)
    print(f"server                {tokens / wall:9.0f} tokens/s, {len(texts) / wall:.0f} requests/s")
    print(f"latency               median {statistics.median(ordered) * 1e3:.1f} ms, "
          f"p99 {ordered[int(len(ordered) * 0.99)] * 1e3:.1f} ms")  # fmt: skip
    print(f"for each request      {wall / len(texts) * 1e3:.2f} ms of time, "
          f"{(cpu_seconds(pid) - before) / len(texts) * 1e3:.2f} ms of the server's CPU")  # fmt: skip
    print(f"rewards               {same} of {len(texts)} are the offline ones, bit for bit")


async def soak(port: int, pid: int, texts: list[str], expected: np.ndarray, count: int, seconds: float) -> None:
    """Mix good and bad requests, disconnects and overload; count what came back."""
    seen: Counter[str] = Counter()
    memory: list[float] = []
    end = time.monotonic() + seconds
    bad = [
        b"{", b"[]", b'{"query": 1}', b'{"query": ["a"], "unknown": 1}', b"\xff\xfe", b'{"query": [""]}',
    ]  # fmt: skip

    async def client(number: int) -> None:
        chance = random.Random(number)
        connection = Client(port)
        while time.monotonic() < end:
            what = chance.random()
            chosen = [chance.randrange(len(texts)) for _ in range(1 if what < 0.7 else chance.randrange(1, 48))]
            body = json.dumps({"query": [texts[index] for index in chosen]}).encode()
            if what > 0.92:
                await connection.send("/get_reward", body)
                await asyncio.sleep(chance.random() * 0.05)
                await connection.close()
                seen["gone"] += 1
            elif what > 0.84:
                status, _ = await connection.post("/get_reward", chance.choice(bad))
                seen[f"bad: {status}"] += 1
            else:
                status, answer = await connection.post("/get_reward", body)
                seen[str(status)] += 1
                if status == 200:
                    rewards = np.array(json.loads(answer)["rewards"], dtype=np.float32)
                    seen["wrong reward"] += int((rewards != expected[chosen]).any())

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append(resident(pid))
            await asyncio.sleep(1)

    await asyncio.gather(watch(), *(client(number) for number in range(count)))
    print("answers " + ", ".join(f"{name} x {number}" for name, number in sorted(seen.items())))
    for part in range(10):
        start, stop = len(memory) * part // 10, len(memory) * (part + 1) // 10
        print(f"memory  {max(memory[start:stop], default=0.0):7.1f} MB at most in part {part + 1} of 10")


def resident(pid: int) -> float:
    """Return a process' resident memory in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024 / 1e6  # type: ignore[index]


def cpu_seconds(pid: int) -> float:
    """Return a process' CPU time."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


if __name__ == "__main__":
    main()
