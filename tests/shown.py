"""Run what the pages show and compare what it prints: `make shown`, or `python tests/shown.py [--update] [PAGE...]`.

Every page runs in an empty folder, its blocks in order; `tests/shown_pages.py` says how they are marked. Each block of
commands is a bash of its own, and the Python of a page one interpreter. With --update the pages get the output that came.

Kept tools were looked at. sybil and pytest-examples find blocks and leave running commands, masks and marks to us;
mktestdocs compares no output; cog wants the code a second time, in its comments; byexample has no masks by name, no
background, and lets unmarked blocks pass.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from shown_pages import Block, PageError, StaleMaskError, Step, matches, pages, read_blocks

ROOT = Path(__file__).parent.parent
SECONDS = 120.0  # that a block may take
HOME = "/home/me"  # what the folder of a page is called in its output
DEFAULT_PORT = "5000"  # of rewardrt serve
EXPORTING = threading.Lock()  # two pages are run at a time

# Reads lines of JSON, [code, mode of compile, name], and writes the separator and 0 or 1 after what each prints.
PYTHON = """
import json, os, sys, traceback
lines, sys.stdin = sys.stdin, open(os.devnull)
names = {"__name__": "__main__"}
for line in lines:
    code, mode, name = json.loads(line)
    try:
        exec(compile(code, name, mode), names)
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    print(sys.argv[1], status, flush=True)
"""


@dataclass
class Counts:
    """What became of the blocks of the pages, and what was wrong."""

    run: int = 0
    masked: int = 0
    files: int = 0
    not_run: Counter[str] = field(default_factory=Counter)
    stale: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        """What has to be mended, each with its place."""
        return self.stale + self.failed

    def add(self, other: Counts) -> None:
        """Count another page's blocks too."""
        self.run, self.masked, self.files = self.run + other.run, self.masked + other.masked, self.files + other.files
        self.not_run += other.not_run
        self.stale += other.stale
        self.failed += other.failed

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.not_run.most_common())
        return (
            f"run {self.run}, masked {self.masked}, files {self.files}, not run {self.not_run.total()}"
            f"{f' ({reasons})' if reasons else ''}, stale {len(self.stale)}, failed {len(self.failed)}"
        )


class Shell:
    """Runs the blocks of one page in a folder; what it left running is killed by `close`."""

    def __init__(self, folder: Path, exports: Path, seconds: float = SECONDS) -> None:
        self.folder, self.exports, self.seconds = folder, exports, seconds
        self.separator = f"\036{secrets.token_hex(8)}"
        self.ports: dict[str, str] = {}  # those that the page names -> those that are free here
        self.left: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
        self.python: tuple[subprocess.Popen[bytes], IO[bytes]] | None = None
        kept = {name: os.environ[name] for name in ("LANG", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
        self.environment = kept | {
            "HOME": str(folder),
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
            "PYTHONPATH": f"{ROOT / 'runtime'}:{ROOT / 'export'}",
            "PYTHONUTF8": "1",
            "PYTHONUNBUFFERED": "1",  # both streams in one order, as at a terminal
            "COLUMNS": "100",
            "LC_ALL": "C.UTF-8",
            "TERM": "dumb",
            "HF_HUB_OFFLINE": "1",
        }

    def close(self) -> None:
        """Kill what still runs."""
        for process, output in self.left:
            _kill(process)
            output.close()

    def setup(self, command: str) -> None:
        """Run commands that the page does not show; an export of models/tiny is done once in a run."""
        if found := re.fullmatch(r"rewardrt export models/tiny ([\w./-]+)((?: --?[\w-]+(?: [\w./-]+)?)*)", command):
            kept = self.exports / re.sub(r"\W+", "-", f"bundle{found[2]}")
            with EXPORTING:
                if not (kept / "reward.json").exists():
                    self._bash(f"rewardrt export models/tiny {kept}{found[2]}")
            shutil.copytree(kept, self.folder / found[1])
        else:
            self._bash(command, PYTHONPATH=f"{self.environment['PYTHONPATH']}:{ROOT / 'tests'}")

    def commands(self, block: Block) -> list[list[str]]:
        """Return what each command of a console block printed; one whose exit status is not shown has to succeed."""
        script = "".join(
            f"eval {shlex.quote(self._here(step.code))}\nshown=$?; echo {shlex.quote(self.separator)} $shown; (exit $shown)\n"
            for step in block.steps
        )
        with tempfile.TemporaryFile() as output:
            status = self._wait(self._start(["bash", "-c", script], output), block.line)
            printed, statuses = self._split(output)
        for number, (step, ended) in enumerate(zip(block.steps, [*statuses, status], strict=False)):
            shows = number + 1 < len(block.steps) and block.steps[number + 1].code == "echo $?"
            if ended != 0 and not shows:
                message = f"ends with {ended}, and the page does not show that by `$ echo $?`: {step.code}"
                raise PageError(step.line, "\n".join([message, *printed[number]]))
        if len(statuses) < len(block.steps):
            raise PageError(block.line, "ends before its last command")
        return printed[: len(block.steps)]

    def script(self, block: Block) -> None:
        """Run an sh block, which has to succeed; its output is not shown."""
        try:
            self._bash(self._here(block.body))
        except PageError as error:
            raise PageError(block.line, str(error)) from None

    def code(self, step: Step, mode: str) -> list[str]:
        """Return what lines of Python print, in the interpreter of the page; of those without a prompt, if they succeed."""
        if self.python is None or self.python[0].poll() is not None:
            self.python = self._leave([sys.executable, "-c", PYTHON, self.separator], stdin=subprocess.PIPE)
        process, output = self.python
        assert process.stdin is not None
        begin = os.fstat(output.fileno()).st_size
        name = "<stdin>" if mode == "single" else f"line {step.line}"
        process.stdin.write(json.dumps([self._here(step.code), mode, name]).encode() + b"\n")
        process.stdin.flush()
        end = time.monotonic() + self.seconds
        while time.monotonic() < end and process.poll() is None:
            printed, statuses = self._split(output, begin)
            if statuses:
                if mode == "exec" and statuses[0] != 0:
                    raise PageError(step.line, "\n".join(["the code fails", *printed[0]]))
                return printed[0]
            time.sleep(0.01)
        _kill(process)
        raise PageError(step.line, f"the code ended Python, or took over {self.seconds:g} s")

    def background(self, command: str, line: int, shown: int = 0) -> list[str]:
        """Leave a command running; return what it printed once that is as many lines as are shown, and its port is open."""
        command = self._with_free_port(command)
        port = re.search(r"--port (\d+)", command)
        if port is None and not shown:
            raise PageError(line, f"neither a `--port` nor output tells when it is ready: {command}")
        process, output = self._leave(["bash", "-c", command])
        end = time.monotonic() + self.seconds
        while time.monotonic() < end and process.poll() is None:
            printed = self._split(output)[0][0]
            if len(printed) >= shown and (port is None or _answers(int(port[1]))):
                return printed
            time.sleep(0.02)
        last = "\n".join(self._split(output)[0][0])
        raise PageError(line, f"ended, or was not ready after {self.seconds:g} s: {command}\n{last}")

    def _with_free_port(self, command: str) -> str:
        """Let a server that the page starts at a port take one that is free here; other blocks are told."""
        if "rewardrt serve " in command and "--port" not in command and "--uds" not in command:
            command += f" --port {DEFAULT_PORT}"
        if (found := re.search(r"--port (\d+)", command)) and found[1] not in self.ports:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.ports[found[1]] = str(free.getsockname()[1])
        return self._here(command)

    def _here(self, code: str) -> str:
        for shown, port in self.ports.items():
            code = re.sub(rf"(?<=:){shown}\b|(?<=--port ){shown}\b", port, code)
        return code

    def _bash(self, script: str, **variables: str) -> None:
        with tempfile.TemporaryFile() as output:
            status = self._wait(self._start(["bash", "-ec", script], output, **variables), 0)
            if status != 0:
                raise PageError(0, "\n".join([f"ends with {status}: {script}", *self._split(output)[0][0]]))

    def _leave(self, command: list[str], stdin: int = subprocess.DEVNULL) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
        """Start what runs until the page ends."""
        output = tempfile.TemporaryFile()  # noqa: SIM115 - closed then
        process = self._start(command, output, stdin)
        self.left.append((process, output))
        return process, output

    def _start(
        self, command: list[str], output: IO[bytes], stdin: int = subprocess.DEVNULL, **variables: str
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment | variables,
            stdin=stdin,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _wait(self, process: subprocess.Popen[bytes], line: int) -> int:
        try:
            return process.wait(self.seconds)
        except subprocess.TimeoutExpired:
            raise PageError(line, f"took over {self.seconds:g} s") from None
        finally:
            _kill(process)

    def _split(self, output: IO[bytes], begin: int = 0) -> tuple[list[list[str]], list[int]]:
        """Return the lines between separators, as the page would show them, and the exit statuses that stand there."""
        content = os.pread(output.fileno(), 1 << 24, begin).decode(errors="replace")
        content = content.replace(str(self.folder), HOME)
        for shown, port in self.ports.items():
            content = re.sub(rf"(?<=:){port}\b", shown, content)
        parts = re.split(rf"{self.separator} (\d+)\n", content)
        printed = [part.removesuffix("\n").split("\n") if part else [] for part in parts[::2]]
        return printed, [int(status) for status in parts[1::2]]


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    if process.stdin is not None:
        process.stdin.close()


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextmanager
def _shell(exports: Path, seconds: float) -> Iterator[Shell]:
    """Give a page its folder, until it ends."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("models", "examples"):
            (Path(folder) / name).symlink_to(ROOT / name)
        shell = Shell(Path(folder), exports, seconds)
        try:
            yield shell
        finally:
            shell.close()


def check(page: Path, name: str, exports: Path, update: bool = False, seconds: float = SECONDS) -> Counts:
    """Run the blocks of a page; with `update` write the output that came into it, where it is not what is shown."""
    lines = page.read_text(encoding="utf-8").split("\n")
    counts = Counts()
    blocks, errors = read_blocks(lines)
    if not update:
        counts.stale = _places(name, errors, stale=True)
    counts.failed = _places(name, errors, stale=False)
    if counts.wrong:
        return counts
    changes: list[tuple[Step, list[str]]] = []
    with _shell(exports, seconds) as shell:
        for block in blocks:
            counts.run += block.kind == "run" and not block.masks
            counts.masked += bool(block.masks)
            counts.files += block.kind == "file"
            counts.not_run.update([block.argument] if block.kind == "not run" else [])
            try:
                for step, got in _run(shell, block):
                    if not matches(step.shown, got, block.masks):
                        changes.append((step, got))
                        counts.failed += [] if update and _can_show(step, got) else [_difference(name, step, got)]
            except PageError as error:
                counts.failed.append(f"{name}:{error.line or block.line}: {error}")
    if update:
        for step, got in reversed([change for change in changes if _can_show(*change)]):
            lines[step.start : step.stop] = [step.indent + line if line else line for line in got]
        page.write_text("\n".join(lines), encoding="utf-8")
        counts.stale = _places(name, read_blocks(lines)[1], stale=True)
    return counts


def _places(name: str, errors: list[PageError], stale: bool) -> list[str]:
    return [f"{name}:{error.line}: {error}" for error in errors if isinstance(error, StaleMaskError) == stale]


def _run(shell: Shell, block: Block) -> Iterator[tuple[Step, list[str]]]:
    """Run a block; yield each of its commands with what it printed."""
    if block.kind == "setup" and block.background:
        shell.background(block.argument, block.line)
    elif block.kind == "setup":
        shell.setup(block.argument)
    elif block.kind == "file":
        path = shell.folder / block.argument
        if path.exists():
            raise PageError(block.line, f"{block.argument} is there already")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.body, encoding="utf-8")
    elif block.kind == "run" and block.background:
        step = block.steps[0]
        yield step, shell.background(step.code, block.line, sum(line.strip() != "..." for line in step.shown))
    elif block.kind == "run" and block.language == "console":
        yield from zip(block.steps, shell.commands(block), strict=True)
    elif block.kind == "run" and block.language == "sh":
        shell.script(block)
    elif block.kind == "run":
        for step in block.steps:
            yield step, shell.code(step, "single" if block.language == "pycon" else "exec")


def _can_show(step: Step, got: list[str]) -> bool:
    """Tell whether output can be written into the page: there is a place, and it does not leave out lines."""
    return step.has_place and "..." not in [line.strip() for line in (*step.shown, *got)]


def _difference(name: str, step: Step, got: list[str]) -> str:
    lines = difflib.unified_diff(step.shown, got, "shown", "printed", lineterm="")
    return "\n".join([f"{name}:{step.line}: prints something else than what is shown", *lines])


def main() -> int:
    """Return the exit status: 0 when every page is as it shows."""
    parser = argparse.ArgumentParser(description="Run what the pages show, and compare what it prints.")
    parser.add_argument("--update", action="store_true", help="write the output that came into the pages")
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE", help="all, unless some are named")
    arguments = parser.parse_args()
    named = [page.resolve() for page in arguments.pages]
    chosen = named or pages(ROOT)
    total = Counts()
    with tempfile.TemporaryDirectory() as exports, ThreadPoolExecutor(2) as pool:

        def run(page: Path) -> tuple[Counts, float]:
            began = time.monotonic()
            return check(page, _name(page), Path(exports), arguments.update), time.monotonic() - began

        for page, (counts, seconds) in zip(chosen, pool.map(run, chosen), strict=True):
            print(f"{_name(page)}: {counts}; {seconds:.0f} s", *counts.wrong, sep="\n", flush=True)
            total.add(counts)
    print(f"shown blocks: {total}")
    return 1 if total.wrong else 0


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


if __name__ == "__main__":
    sys.exit(main())
