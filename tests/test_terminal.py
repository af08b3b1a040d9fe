"""What a newcomer sees at a terminal: tables that fit, steps with their time, refusals that say what to type, Ctrl+C."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import click
import pytest

from commands import run
from rewardrt.cli.app import GROUPS, app
from rewardrt.cli.output import columns, one_line
from rewardrt.cli.progress import duration
from rewardrt.machine import kernels
from terminal import COMMAND, at_terminal

ROOT = Path(__file__).parent.parent
BUNDLE = ROOT / "tests" / "bundles" / "version-1"
CHINESE = "请告诉我如何写一封正式的道歉信，给我的邻居。" * 10
ROWS = [
    {"prompt": "Name a colour. " * 30, "responses": ["Blue. " * 60, "No.", CHINESE]},
    {"prompt": CHINESE, "chosen": CHINESE, "rejected": "Seven " * 60},
    {"text": "e\u0301" * 500},
    {"prompt": "without an answer"},
    {"text": "👩‍👩‍👧\x1b[31m " * 100},
]


def cells(text: str) -> int:
    """Count columns as the Unicode standard has it (UAX 11), in words of its own."""
    found = 0
    for character in text:
        if unicodedata.category(character) in ("Mn", "Me", "Cf"):
            continue
        found += 1 + (unicodedata.east_asian_width(character) in ("W", "F"))
    return found


@pytest.mark.parametrize("width", [60, 200])
def test_a_table_fits_the_terminal_and_no_bar_is_left_in_it(width: int, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    shown = at_terminal([*COMMAND, "score", str(BUNDLE), str(tmp_path / "in.jsonl"), "--table"], width)
    assert shown.returncode == 1
    first = shown.lines.index(f"{BUNDLE}: fp32 on cpu") + 1
    last = next(number for number, line in enumerate(shown.lines) if line.startswith("scored 4 of 5 rows"))
    table = [line for line in shown.lines[first:last] if line]
    assert not any("|" in line or "tokens/s" in line for line in table)
    plain = [line for line in table if not line.startswith("error: ")]
    assert all(cells(line) <= width for line in plain)
    cut = [line for line in plain if "…" in line]
    assert len(cut) >= 7 and all(cells(line) >= width - 1 for line in cut)  # a wide character may leave one free
    assert table[table.index("without an answer") + 1].startswith("error: expected text, or messages ending with")


@pytest.mark.parametrize("width", [60, 200])
def test_a_pair_says_which_answer_was_chosen_and_its_numbers_stand_below_each_other(width: int, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "yes", "rejected": "no"}) + "\n")
    result = run("score", BUNDLE, tmp_path / "in.jsonl")
    row = json.loads(result.stdout)
    shown = at_terminal([*COMMAND, "score", str(BUNDLE), str(tmp_path / "in.jsonl"), "--table"], width)
    pairs = [
        (row["chosen_reward"], row["tokens"][0], "chosen    yes"),
        (row["rejected_reward"], row["tokens"][1], "rejected  no"),
    ]
    expected = [
        f"{rank:4d}  {reward:9.4f}  {tokens:6d}  {answer}"
        for rank, (reward, tokens, answer) in enumerate(sorted(pairs, reverse=True), 1)
    ]
    start = shown.lines.index("rank     reward  tokens            answer")
    assert shown.lines[start + 1 : start + 3] == expected


def test_lines_are_cut_by_columns() -> None:
    assert one_line("a b\n c", 5) == "a b c"
    assert one_line("abcdef", 5) == "abcd…"
    assert [one_line("漢漢漢", width) for width in (6, 5, 4)] == ["漢漢漢", "漢漢…", "漢…"]
    assert one_line("e\u0301e\u0301e\u0301", 3) == "e\u0301e\u0301e\u0301"
    assert columns("漢e\u0301👩") == 5
    assert one_line("x" * 10_000_000, 4) == "xxx…"


STEPS = """
import sys, time
from rewardrt.cli import progress
from rewardrt.cli.progress import Steps
from rewardrt.steps import Step, begin
progress.LOG_SECONDS = 0.3
with Steps() as steps:
    steps(Step("reading"))
    steps(Step("tokenizer: file's", note=True))
    count = begin(steps, "writing " + "a long name " * 20, "weight")
    for at in range(1, 4):
        count(at, 3)
        time.sleep(0.4)
    steps(Step("certifying"))
    if len(sys.argv) > 1:
        raise SystemExit(3)
"""


def test_steps_at_a_terminal_have_a_line_each_that_keeps_its_time() -> None:
    shown = at_terminal([sys.executable, "-c", STEPS], 60)
    kinds = [re.sub(r"\d+\.\d s$", "T", line) for line in shown.lines]
    long = "writing " + "a long name " * 20
    assert kinds == ["tokenizer: file's", "reading: T", f"{long}: T", "certifying: T"]
    changing = [part for part in re.split("[\r\n]+", shown.written) if "weight" in part]
    assert {part[part.index("weight") :].split(",")[0] for part in changing} == {
        f"weight {at} of 3" for at in (1, 2, 3)
    }
    assert all(len(part) < 60 and "…: weight" in part for part in changing)


def test_steps_that_are_not_finished_say_where_they_stopped() -> None:
    shown = at_terminal([sys.executable, "-c", STEPS, "stop"], 60)
    assert shown.returncode == 3
    assert re.fullmatch(r"certifying, stopped after \d\.\d s", shown.lines[-1])


def test_steps_in_a_log_have_a_line_each_and_more_where_they_take_long() -> None:
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True, timeout=60)
    lines = [re.sub(r"^\[\d+\.\d s\] ", "", line) for line in done.stderr.splitlines()]
    long = "writing " + "a long name " * 20
    assert (lines[:3], lines[-1]) == (["reading", "tokenizer: file's", long], "certifying")
    assert 2 <= len(lines[3:-1]) <= 4  # 1.2 s with a line every 0.3 s, on a machine that may be slow
    assert all(re.fullmatch(re.escape(long) + r": weight [123] of 3, for \d\.\d s", line) for line in lines[3:-1])


def test_times_are_said_as_people_say_them() -> None:
    seconds = (0.04, 9.94, 12.3, 99, 100, 3599, 3600, 7325)
    said = ["0.0 s", "9.9 s", "12 s", "99 s", "1 min 40 s", "59 min 59 s", "1 h 0 min", "2 h 2 min"]
    assert [duration(each) for each in seconds] == said


def test_verify_shows_what_it_is_at_and_leaves_only_the_result() -> None:
    shown = at_terminal([*COMMAND, "verify", str(BUNDLE)])
    assert (shown.returncode, shown.lines[-1], len(shown.lines)) == (0, "passed", 5)
    assert shown.lines == run("verify", BUNDLE).stdout.splitlines()
    assert run("verify", BUNDLE).stderr == ""


REFUSALS = {
    "no such command": (("exprot", "a"), "error: No such command 'exprot'; did you mean export? (see `rewardrt --help`)"),
    "no such option": (("score", "--tabel"), "--table"),
    "a checkpoint to score with": (("score", "{checkpoint}", "x"), "{checkpoint}: a checkpoint, not a bundle; make one of it: `rewardrt export {checkpoint} BUNDLE`"),
    "a checkpoint to serve": (("trainer", "trl", "--bundle", "{checkpoint}"), "a checkpoint, not a bundle; make one"),
    "no bundle": (("verify", "org/model"), "org/model: expected a bundle folder, found nothing; `rewardrt export CHECKPOINT BUNDLE` makes one"),
    "a bundle's file": (("inspect", "{bundle}/reward.json"), "found a file: give its folder, {bundle}"),
    "a bundle to export": (("export", "{bundle}", "new"), "{bundle}: a bundle already, which `rewardrt score {bundle} ROWS.jsonl` scores with"),
    "a checkpoint's file": (("export", "{checkpoint}/config.json", "new"), "found a file; give the folder that it lies in, {checkpoint}"),
    "a target that is there": (("export", "{checkpoint}", "{bundle}"), "{bundle}: exists already; choose another folder, or replace it with --force"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_says_what_to_type_instead(name: str, tmp_path: Path) -> None:
    """Those of an export come before torch is loaded, which would show as a step."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    names = {"checkpoint": str(tmp_path / "checkpoint"), "bundle": str(BUNDLE)}
    arguments, said = REFUSALS[name]
    if arguments[0] == "export" and importlib.util.find_spec("torch") is None:
        pytest.skip("without the extra export, its command says that this is missing")
    result = run(*(each.format(**names) for each in arguments))
    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert said.format(**names) in result.stderr


def test_families_say_what_comes_next_at_a_terminal_alone() -> None:
    assert run("families").stderr == ""
    shown = at_terminal([*COMMAND, "families"], 200)
    assert shown.lines[-1].startswith("next: `rewardrt export CHECKPOINT BUNDLE`, with --family NAME")


def test_the_help_lists_the_commands_in_the_order_of_use() -> None:
    lines = run("--help").stdout.splitlines()
    listed = [line.split()[0] for line in lines if re.match(r"  [a-z]+ {2,}\S", line)]
    assert listed == [name for names in GROUPS.values() for name in names]
    assert not any(line.endswith("...") for line in lines[1:])
    narrow = at_terminal([*COMMAND, "--help"], 60)
    assert [line.split()[0] for line in narrow.lines if re.match(r"  [a-z]+ {2,}\S", line)] == listed
    assert not any(line.endswith("...") for line in narrow.lines[1:])


def test_every_command_has_an_example_whose_options_it_has() -> None:
    with click.Context(app, info_name="rewardrt") as context:
        for name in app.list_commands(context):
            command = app.get_command(context, name)
            assert command is not None and command.epilog is not None and command.short_help is not None
            lines = re.findall(r"^  (rewardrt .*)$", command.epilog, re.MULTILINE)
            assert any(line.startswith(f"rewardrt {name}") for line in lines), name
            for line in lines:
                known = app.get_command(context, line.split()[1])
                assert known is not None, line
                options = {option for parameter in known.params for option in parameter.opts}
                assert set(re.findall(r" (--?[a-z][a-z-]*)", line)) <= options, line


INTERRUPTED = """
import os, signal, sys
class AtImport:
    def find_spec(self, name, path, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, AtImport())
sys.argv = ["rewardrt", "inspect", {bundle!r}]
from rewardrt_command import main
main()
"""


@pytest.mark.parametrize("name", ["rewardrt", "numpy", "click", "rewardrt.cli.verify", "rewardrt.bundle.manifest"])
def test_ctrl_c_while_python_imports_is_one_line(name: str) -> None:
    program = INTERRUPTED.format(name=name, bundle=str(BUNDLE))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def test_a_job_that_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    program = INTERRUPTED.format(name="numpy", bundle=str(BUNDLE))
    command = [sys.executable, "-c", f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{program}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


CONVERTED = """
import os, signal, sys
import click
from rewardrt.cli.toplevel import run

@click.command()
def command():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(10**6))
    except BaseException:
        if sys.argv[1:] == []:
            raise ImportError("initialization failed", name="onnxruntime")

run(command)
"""


def test_ctrl_c_is_said_whatever_a_library_makes_of_it() -> None:
    done = subprocess.run([sys.executable, "-c", CONVERTED], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


def test_ctrl_c_ends_bench_and_its_processes_in_one_line(tmp_path: Path) -> None:
    rows = [{"text": f"number {number} " + "word " * 200} for number in range(100)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [*COMMAND, "bench", str(BUNDLE), str(tmp_path / "in.jsonl"), "--rounds", "1000"]
    shown = at_terminal(command, interrupt_after="1000 rounds")
    assert (shown.returncode, [line.removeprefix("^C") for line in shown.lines[2:]]) == (130, ["error: interrupted"])
    if Path("/proc").is_dir():
        left = [each.read_bytes() for each in Path("/proc").glob("[0-9]*/cmdline") if _readable(each)]
        assert not any(
            str(BUNDLE).encode() in line and b"rewardrt.checks.bench" in line and b"1000" in line for line in left
        )


def _readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:  # it has ended meanwhile
        return False
    return True


def test_ctrl_c_ends_verify_in_one_line() -> None:
    shown = at_terminal([*COMMAND, "verify", str(BUNDLE)], interrupt_after="scoring the golden texts")
    assert shown.returncode in (0, 130)  # a fast machine has scored them all
    if shown.returncode:
        assert shown.lines == ["error: interrupted"]


@pytest.mark.parametrize(
    ("found", "platform", "sets", "said"),
    [
        (
            {"apt-get"},
            "linux",
            ("avx512_vnni",),
            "install a C compiler, `sudo apt-get install gcc libc6-dev`, and install",
        ),
        ({"dnf"}, "linux", ("avx512_vnni",), "install a C compiler, `sudo dnf install gcc`, and install rewardrt"),
        (
            {"cc", "dnf"},
            "linux",
            ("avx512_vnni",),
            "on two cores): install rewardrt from its source again, `pip install",
        ),
        (set(), "linux", ("avx512_vnni",), "install a C compiler, and install rewardrt from its source"),
        ({"apt-get"}, "linux", ("avx2",), None),
        (set(), "darwin", (), None),
    ],
)
def test_the_doctor_says_what_missing_kernels_cost_and_what_mends_it(
    found: set[str],
    platform: str,
    sets: tuple[str, ...],
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(kernels, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setattr(kernels.shutil, "which", lambda name: name if name in found else None)
    monkeypatch.setattr(kernels.sys, "platform", platform)
    monkeypatch.setattr(kernels.platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("CC", raising=False)
    advice = kernels.advice(sets)
    assert (advice is None) == (said is None)
    if said is not None:
        assert advice is not None
        assert said in advice and "151 ms instead of 80 ms" in advice
    expected = "none: they were not compiled" if platform == "linux" else "none: they are for x86-64 Linux"
    assert kernels.describe() == expected


def test_the_figures_that_the_doctor_names_are_those_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    assert "256 tokens of a 135M model: 151 ms instead of 80 ms on two cores" in readme
