"""How the command ends: one line for what is not our fault, a report for what is, never a traceback, no row lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from rewardrt.cli import app, toplevel
from rewardrt.display import visible, visible_lines
from rewardrt.errors import RowError

BUNDLE = Path(__file__).parent / "bundles" / "version-1"
COMMAND = [sys.executable, "-c", "from rewardrt.cli.app import main; main()"]
ROW = b'{"text": "a"}\n'


def start(
    *arguments: object, stdin: bytes = b"", shell: str = "", limit: tuple[int, int] | None = None, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run the command; `shell` are redirections, `limit` is a resource and what the process may use of it."""
    command = ["sh", "-c", f'exec "$@" {shell}', "sh", *COMMAND, *map(str, arguments)]
    before = (lambda: resource.setrlimit(limit[0], (limit[1], limit[1]))) if limit else None
    return subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        check=False,
        timeout=60,
        env=os.environ | environment,
        preexec_fn=before,
    )


STREAMS: dict[str, tuple[tuple[object, ...], str, str]] = {
    "score, output full": (("score", BUNDLE, "-"), ">/dev/full", "standard output: cannot be written (No space left on device)"),
    "score a table, output full": (("score", BUNDLE, "-", "--table"), ">/dev/full", "standard output: cannot be written"),
    "score -o, disk full": (("score", BUNDLE, "-", "-o", "/dev/full"), "", "/dev/full: cannot be written (No space left on device); make room"),
    "score a prompt, output full": (("score", BUNDLE, "--prompt", "a", "--response", "b"), ">/dev/full", "standard output: cannot be written"),
    "score, output closed": (("score", BUNDLE, "-"), ">&-", "standard output: cannot be written (it was closed before"),
    "score, input closed": (("score", BUNDLE, "-"), "<&-", "standard input is closed; send it rows"),
    "inspect, output full": (("inspect", BUNDLE), ">/dev/full", "standard output: cannot be written"),
    "inspect --json, output full": (("inspect", BUNDLE, "--json"), ">/dev/full", "standard output: cannot be written"),
    "inspect, output closed": (("inspect", BUNDLE), ">&-", "standard output: cannot be written"),
    "doctor, output full": (("doctor",), ">/dev/full", "standard output: cannot be written"),
    "help, output full": (("--help",), ">/dev/full", "the disk is full (No space left on device)"),
    "families (found by entry point), output full": (("families",), ">/dev/full", "the disk is full"),
    "families, output closed": (("families",), ">&-", "a stream is closed"),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_cannot_be_used_is_one_line_and_exit_status_2(name: str) -> None:
    arguments, shell, message = STREAMS[name]
    done = start(*arguments, stdin=ROW, shell=shell)
    lines = [line for line in done.stderr.decode().splitlines() if not line.startswith(str(BUNDLE))]
    assert done.returncode == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


@pytest.mark.parametrize("shell", ["2>&-", "2>/dev/full"])
def test_rows_are_scored_whether_or_not_anybody_reads_the_log(shell: str) -> None:
    done = start("score", BUNDLE, "-", stdin=ROW, shell=shell)
    assert done.returncode == 0
    assert json.loads(done.stdout)["tokens"] == 1


def test_with_an_output_file_standard_output_may_be_closed(tmp_path: Path) -> None:
    done = start("score", BUNDLE, "-", "-o", tmp_path / "out.jsonl", stdin=ROW, shell=">&- 2>&-")
    assert done.returncode == 0
    assert list(json.loads((tmp_path / "out.jsonl").read_bytes())) == ["text", "reward", "tokens", "truncated"]


@pytest.mark.parametrize("rows", [1, 600])
def test_a_disk_that_fills_up_leaves_no_half_written_file(tmp_path: Path, rows: int) -> None:
    (tmp_path / "out.jsonl").write_bytes(b"old")
    row = json.dumps({"text": "a", "id": "x" * 100}).encode() + b"\n"
    limit = (resource.RLIMIT_FSIZE, 100)
    done = start("score", BUNDLE, "-", "-o", tmp_path / "out.jsonl", stdin=row * rows, limit=limit)
    assert done.returncode == 2
    assert b"out.jsonl: cannot be written (File too large); make room" in done.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


COMPUTING_AT_THE_END = """
import atexit, sys, threading, time
import click
from rewardrt import RewardModel
from rewardrt.cli.toplevel import run

model = RewardModel.load(sys.argv.pop())

def score():
    while True:
        model.score_rows([{"text": "a"}])

@click.command()
def command():
    atexit.register(print, "left")
    for _ in range(8):
        threading.Thread(target=score, name="rewardrt-test", daemon=True).start()
    time.sleep(0.3)
    print("done")
    raise click.exceptions.Exit(1)

run(command)
"""


def test_a_thread_that_still_computes_does_not_change_how_the_command_ends() -> None:
    command = [sys.executable, "-c", COMPUTING_AT_THE_END, str(BUNDLE)]
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"done\nleft\n", b"")


def test_a_process_that_runs_the_command_goes_on_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the command's own threads end the process at once: those of whoever calls it are none of its business."""
    ended = threading.Event()
    threading.Thread(target=ended.wait, name="rewardrt-of-the-caller", daemon=True).start()
    monkeypatch.setattr(sys, "argv", ["rewardrt", "inspect", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as caught:
        app.main()
    ended.set()
    assert caught.value.code == 2


def test_bench_says_at_once_that_its_figures_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(ROW)
    began = time.monotonic()
    done = start("bench", BUNDLE, tmp_path / "in.jsonl", "--json", tmp_path / "none" / "figures.json")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert b"figures.json: cannot be written (No such file or directory)" in done.stderr
    assert time.monotonic() - began < 10  # before it measured for minutes


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONUTF8": "1"},
    ],
    ids=str,
)
def test_every_terminal_gets_every_text(environment: dict[str, str]) -> None:
    rows = [
        {"prompt": "é…漢 \x1b[31m\x9b\u202e", "responses": ["é…漢 \x1b[31m", "x" * 200]},
        {"text": "漢\ud800"},
    ]
    stdin = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    table = start("score", BUNDLE, "-", "--table", stdin=stdin, **environment)
    assert (table.returncode, b"Traceback" in table.stderr) == (1, False)
    assert not {0x1B, 0x0D} & set(table.stdout)
    encoding = environment.get("PYTHONIOENCODING", "utf-8" if environment["PYTHONUTF8"] == "1" else "ascii")
    expected = "é…漢".encode(encoding, "backslashreplace")
    assert expected + b" \\x1b[31m" in table.stdout
    plain = start("score", BUNDLE, "-", stdin=stdin, **environment)
    out = [json.loads(line) for line in plain.stdout.decode("utf-8").splitlines()]  # JSON is UTF-8 everywhere
    assert [row.get("prompt", row.get("text")) for row in out] == ["é…漢 \x1b[31m\x9b\u202e", "漢\ud800"]
    manifest = start("inspect", BUNDLE, "--json", **environment)
    assert json.loads(manifest.stdout.decode("utf-8"))["format_version"] == 1


def test_a_table_shows_what_was_scored_and_not_the_rows_own_fields_of_such_names() -> None:
    row = {"text": "a", "rewards": 5, "margin": 1, "step_rewards": "x", "response": None, "objectives": 3}
    done = start("score", BUNDLE, "-", "--table", stdin=json.dumps(row).encode())
    assert (done.returncode, done.stderr.count(b"error")) == (0, 0)
    assert done.stdout.decode().split() == ["7.0233", "a"]


@pytest.mark.parametrize("options", [[], ["-o", "out.jsonl"]])
def test_ctrl_c_is_one_line_though_a_thread_waits_for_standard_input(tmp_path: Path, options: list[str]) -> None:
    process = subprocess.Popen(
        [*COMMAND, "score", str(BUNDLE), "-", *options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - a job may ignore it
    )  # fmt: skip
    assert process.stdin is not None and process.stderr is not None
    with process:
        process.stdin.write(ROW)
        process.stdin.flush()
        first = process.stderr.readline()  # the bundle is loaded, and the command waits for more rows
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        said = "no row is safe yet; nothing was written" if options else "after 0 rows"
        lines = (first + process.stderr.read()).decode().splitlines()
        assert lines[0] == f"{BUNDLE}: fp32 on cpu"
        # Without more, where a slow machine has not begun with the file yet.
        assert lines[1:] in ([f"error: interrupted: {said}"], ["error: interrupted"])
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_ends_the_command_in_silence() -> None:
    done = subprocess.run(
        ["bash", "-c", '"$@" | head -c 1; exit ${PIPESTATUS[0]}', "bash", *COMMAND, "score", BUNDLE, "-"],
        input=json.dumps({"text": "a", "id": "x" * 10_000}).encode() * 1 + b"\n" + ROW * 5000,
        capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, b"{")
    assert done.stderr.decode().splitlines() == [f"{BUNDLE}: fp32 on cpu"]


FAULT = """
import sys
from rewardrt.scoring import answers
def parse(row):
    return {}[row["text"]]
answers.parse_row = parse
from rewardrt.cli.app import main
main()
"""


def test_a_fault_of_ours_says_so_and_shows_where_but_no_text_and_no_path(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(FAULT)
    (tmp_path / "in.jsonl").write_text('{"text": "a text of the user"}\n')
    command = [sys.executable, str(program), "score", str(BUNDLE), str(tmp_path / "in.jsonl"), "-o", "out.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)
    assert done.returncode == 3
    _, said, report = done.stderr.splitlines()
    assert said == (
        "error: a fault of RewardRT itself (KeyError), not of what it was given; "
        "please report it to RewardRT's developers with the next line"
    )
    assert report.startswith("report: rewardrt ")
    for part in (
        f"Python {sys.version.split()[0]}",
        "onnxruntime 1.",
        "KeyError: ...; at ",
        "rewardrt/data/files.py:",
        "program.py:",
    ):
        assert part in report
    assert "a text of the user" not in report
    assert str(tmp_path) not in report
    assert not (tmp_path / "out.jsonl").exists()


def raised_by(call: Callable[[], object]) -> BaseException:
    try:
        call()
    except BaseException as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: None.nothing, "AttributeError: 'NoneType' object has no attribute 'nothing'"),  # type: ignore[attr-defined]
        (lambda: int(input_text()), "ValueError: invalid literal for int() with base 10: ..."),
        ([].pop, "IndexError: pop from empty list"),
        (lambda: raise_(ValueError("it's /home/me/rows.jsonl")), "ValueError: it..."),
        (lambda: raise_(ValueError("cannot map /home/me/rows.jsonl now")), "ValueError: cannot map ... now"),
        (lambda: raise_(ValueError("\x1b[31m\n" + "x " * 500)), "ValueError: \\x1b[31m x x x"),
    ],
)
def test_a_report_holds_names_of_the_code_and_nothing_that_was_scored(call: Callable[[], object], message: str) -> None:
    found = visible(toplevel.report(raised_by(call)))
    assert message in found
    assert len(found) < 600
    assert "/home" not in found


def input_text() -> str:
    return "".join(map(chr, (115, 101, 99, 114, 101, 116)))


def raise_(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (RowError("one\ntwo \x1b[31m"), 2, "error: one\\ntwo \\x1b[31m\n"),
        (click.UsageError("no"), 2, "error: no (see `rewardrt --help`)\n"),
        (click.FileError("f", "gone"), 2, "error: Could not open file 'f': gone\n"),
        (MemoryError(), 2, "error: out of memory: this machine, or the limit of this process, has no more to give\n"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 2, "error: f: the disk is full (No space left on device)\n"),
        (PermissionError(errno.EACCES, "Permission denied", "f"), 2, "error: f: no permission (Permission denied)\n"),
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/var/tmp']"), 2,
            "error: no writable temporary folder; set the variable TMPDIR to one\n",
        ),
        (
            ImportError("numpy.core failed", name="numpy"), 2,
            "error: a package that RewardRT needs does not import (numpy.core failed); install rewardrt anew in this environment\n",
        ),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (BrokenPipeError(), 1, ""),
    ],
)  # fmt: skip
def test_what_is_not_our_fault_is_named_in_one_line(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert toplevel._end(error) == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "error", [KeyError("x"), RecursionError(), AssertionError(), OSError("no number"), ImportError(name="rewardrt.x")]
)
def test_everything_else_is_a_fault_of_ours(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    assert toplevel._end(error) == 3
    said, report = capsys.readouterr().err.splitlines()
    assert "a fault of RewardRT itself" in said
    assert report.startswith("report: rewardrt")


def test_usage_is_one_line_for_every_command() -> None:
    for command in ("score", "verify", "inspect", "bench", "serve", "doctor", "export", "families"):
        done = start(command, "--nonsense")
        assert (done.returncode, done.stdout) == (2, b"")
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.decode().startswith(
            ("error: No such option '--nonsense'.", "error: No such option: --nonsense")  # click 8.5, and 8.2
        )
        assert done.stderr.decode().endswith(f"(see `rewardrt {command} --help`)\n")


def test_errors_of_the_library_are_pythons_own() -> None:
    code = "from rewardrt import RewardModel; RewardModel.load('/nowhere')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, "Traceback (most recent call last):")


def test_visible_text_is_one_line_without_terminal_codes() -> None:
    assert visible("é…漢👩‍👩‍👧 \x1b]0;x\x07 \x9b1m \r\n\t\x7f\u2028\u202e\ud800") == (
        "é…漢👩‍👩‍👧 \\x1b]0;x\\x07 \\x9b1m \\r\\n\\t\\x7f\\u2028\\u202e\\ud800"
    )
    assert visible_lines("a\nb\rc") == "a\nb\\rc"
