"""What is given for JSONL and is something else is named by its first bytes, in one line, and no run goes on for nothing."""

from __future__ import annotations

import bz2
import io
import json
import lzma
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commands import run
from rewardrt.data import formats
from rewardrt.data.files import score_file
from rewardrt.data.formats import jsonl_lines
from rewardrt.data.lines import read_lines
from rewardrt.errors import RewardRTError, RowError
from rewardrt.scoring.answers import flatten, read_rows, regroup
from rewardrt.scoring.scored import Scored, ScoredRow
from rewardrt.text.fields import NAMES
from rewardrt.text.rows import Row, parse_row

BUNDLE = Path(__file__).parent / "bundles" / "version-1"
ROWS = [{"text": "a"}, {"prompt": "b", "response": "c"}]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("rows.jsonl", LINES)
    return file.getvalue()


OTHERS: dict[str, tuple[bytes, str]] = {
    "bzip2": (bz2.compress(LINES), "found bzip2: unpack it"),
    "xz": (lzma.compress(LINES), "found xz: unpack it"),
    "zip": (zipped(), "found a zip archive: unpack it"),
    "SQLite": (b"SQLite format 3\x00\x10", "found an SQLite database"),
    "numbers": (b"\x01\x00\x02", "found binary data"),
    "UTF-16": (LINES.decode().encode("utf-16"), "found UTF-16: convert it: `iconv -f utf-16 -t utf-8 FILE`"),
    "UTF-16 without its mark": (LINES.decode().encode("utf-16-le"), "found UTF-16: convert it: `iconv -f utf-16le"),
    "UTF-16, the other end first": (b"\xfe\xff" + LINES.decode().encode("utf-16-be"), "found UTF-16"),
    "UTF-32": (LINES.decode().encode("utf-32"), "found UTF-32"),
    "nothing": (b"", "found an empty file"),
    "zeros": (b"\x00" * 10_000, "found binary data"),
    "a pretty JSON object": (json.dumps(ROWS[1], indent=2).encode(), "found a JSON object over several lines: put each object on one line"),
    "a JSON object in the style of C": (b'{ "prompt": "b",\n  "response": "c" }\n', "found a JSON object over several lines"),
    "HTML": (b"<!DOCTYPE html>\n<html>", "found HTML or XML: look at it"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "found a pointer of Git LFS and not the file"),
    "CSV": (b"prompt,response\na,b\n", "found CSV: write its rows as JSONL"),
    "TSV": (b"id\ttext\n1\ta\n", "found CSV"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_another_format_is_named_by_its_first_bytes(name: str) -> None:
    data, message = OTHERS[name]
    with pytest.raises(RewardRTError) as caught:
        list(jsonl_lines(io.BytesIO(data), "rows.jsonl"))
    assert message in str(caught.value)
    assert str(caught.value).startswith("rows.jsonl: expected rows as JSONL, a JSON array, Parquet or Arrow; found ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["xz", "UTF-16", "a pretty JSON object", "nothing"])
@pytest.mark.parametrize("source", ["file", "pipe"])
def test_score_stops_with_one_line_whether_it_is_a_file_or_a_pipe(tmp_path: Path, name: str, source: str) -> None:
    data, message = OTHERS[name]
    (tmp_path / "rows.jsonl").write_bytes(data)
    where = tmp_path / "rows.jsonl" if source == "file" else "-"
    done = run("score", BUNDLE, where, "-o", tmp_path / "out.jsonl", stdin=data)
    assert (done.returncode, done.stdout) == (2, "")
    shown = where if source == "file" else "standard input"
    _, line = done.stderr.splitlines()
    assert line.startswith(
        f"error: {shown}: expected rows as JSONL, a JSON array, Parquet or Arrow; {message.split(':')[0]}"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_bench_names_another_format_too(tmp_path: Path) -> None:
    (tmp_path / "rows.xz").write_bytes(lzma.compress(LINES))
    done = run("bench", BUNDLE, tmp_path / "rows.xz")
    assert done.returncode == 2
    assert "found xz" in done.stderr.splitlines()[-1]


JSONL = [
    LINES,
    b"[1]\n" + LINES,  # a first row that is none is a row's own error
    b'[{"text": "a"}]\n' + LINES,
    b"[1, 2]",
    b"[]",
    b'{"text": "a"',  # a file that was cut off
    b'{"text": "a",\n' + LINES,
    b"not json\n" + LINES,
    b"\n\n" + LINES,
    b'"text"\n',
    b"\xff\xff\n",
    b"\xef\xbb\xbf" + LINES,
]


@pytest.mark.parametrize("data", JSONL)
def test_lines_of_jsonl_are_those_of_the_file(data: bytes) -> None:
    assert list(jsonl_lines(io.BytesIO(data), "rows.jsonl")) == list(io.BytesIO(data))


@settings(deadline=None)
@given(st.lists(st.binary(max_size=20).filter(lambda line: b"\n" not in line), min_size=1, max_size=5))
def test_every_other_stream_comes_out_as_it_went_in(lines: list[bytes]) -> None:
    data = b'{"text": "a"}\n' + b"\n".join(lines)
    assert b"".join(jsonl_lines(io.BytesIO(data), "rows")) == data


@given(st.binary(max_size=200))
def test_any_bytes_are_lines_or_a_refusal(data: bytes) -> None:
    found, refused = b"", ""
    try:
        found = b"".join(jsonl_lines(io.BytesIO(data), "rows"))
    except RewardRTError as error:
        refused = str(error)
    assert found == data if not refused else refused.startswith("rows: expected rows as JSONL")


def test_a_line_without_an_end_is_not_held_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LINE_BYTES", 10_000)
    monkeypatch.setattr("rewardrt.data.lines.LINE_BYTES", 10_000)
    for long in (10_001, 25_000, 100_000):
        for first in (b"", LINES):
            data = first + b'{"text": "' + b"a" * long + b'"}\n' + LINES
            rows = list(read_lines(jsonl_lines(io.BytesIO(data), "rows")))
            errors = [line.row for line in rows if isinstance(line.row, RowError)]
            assert [str(error) for error in errors] == [
                f"line {first.count(b'{') + 1}: longer than 10000 bytes; expected one JSON object"
            ]
            assert len(rows) == data.count(b"\n")


def score(rows: list[Row | RewardRTError]) -> list[ScoredRow | RewardRTError]:
    return regroup(rows, [Scored(1.0, 1, 0) for _ in flatten(rows)])


def scored(rows: list[bytes], out: list[bytes]) -> Any:
    return score_file(read_rows, score, read_lines(rows), out.append)


def test_a_file_of_which_no_row_can_be_scored_is_given_up_after_its_first_rows() -> None:
    read = 0

    def rows() -> Iterator[bytes]:
        nonlocal read
        for _ in range(10**6):
            read += 1
            yield b'{"question": "a", "answer": "b"}\n'

    out: list[bytes] = []
    with pytest.raises(RewardRTError) as caught:
        scored(rows(), out)  # type: ignore[arg-type]
    assert str(caught.value).startswith(
        "none of the first 100 rows can be scored, and the rest was not tried; the first: expected text"
    )
    assert "'question' (prompt here), 'answer' (response here)" in str(caught.value)
    assert out == []
    assert read <= 100 + 4096 + 1  # one window ahead


@pytest.mark.parametrize("good", [0, 50, 99])
def test_one_row_that_can_be_scored_keeps_the_run_going(good: int) -> None:
    rows = [b'{"foo": "a"}\n'] * 5000
    rows[good] = b'{"text": "a"}\n'
    out: list[bytes] = []
    summary = scored(rows, out)
    assert (summary.rows, summary.scored, summary.failed, len(out)) == (5000, 1, 4999, 5000)


def test_fewer_rows_than_that_come_out_with_their_errors() -> None:
    out: list[bytes] = []
    assert scored([b"{}\n"] * 99, out).failed == 99
    assert len(out) == 99


def test_score_gives_up_with_exit_status_2_and_leaves_no_output(tmp_path: Path) -> None:
    stdin = b'{"completion": "a", "prompt": "b"}\n' * 200
    done = run("score", BUNDLE, "-", "-o", tmp_path / "out.jsonl", stdin=stdin)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 2)
    assert "none of the first 100 rows can be scored" in done.stderr
    assert "unused: 'completion' (response here); rename them" in done.stderr
    assert list(tmp_path.iterdir()) == []


UNUSABLE = [
    ({"prompt": "q", "completion": "a"}, "found prompt; unused: 'completion' (response here); rename them"),
    ({"question": "q", "answer": "a"}, "none of these fields; unused: 'question' (prompt here), 'answer' (response here)"),
    ({"query": "q", "response": "a"}, "found response; unused: 'query' (prompt here)"),
    ({"instruction": "q", "input": "", "output": "a"}, "unused: 'instruction' (prompt here), 'output' (response here)"),
    ({"conversations": [{"from": "human", "value": "q"}]}, "unused: 'conversations' (messages, each with role and content here)"),
    ({"choices": [{"message": {"role": "assistant", "content": "a"}}]}, "unused: 'choices' (responses, the content of each choice's message here)"),
    ({"prompt": "q", "completions": ["a"]}, "found prompt; unused: 'completions' (responses here)"),
    ({"chosen": "a", "rejected": "b"}, "chosen and rejected that are strings need the prompt that they answer"),
    ({"question": "q", "chosen": "a", "rejected": "b"}, "strings need the prompt that they answer"),
    ({"Frage": "q", "Antwort": "a\x1b"}, "unused: 'Frage', 'Antwort'; name what is to be scored as above"),
    ({"a\x1b[31m\n": "q"}, "unused: 'a\\x1b[31m\\n'; name"),
    ({"id": 3}, "found none of these fields"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), UNUSABLE)
def test_a_row_with_text_under_other_names_is_told_what_they_are_called_here(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(row)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600


def test_what_a_field_is_called_here_is_a_field_that_rows_have() -> None:
    assert not set(NAMES) & {"text", "messages", "prompt", "response", "responses", "chosen", "rejected", "steps"}
    for name in set(NAMES.values()):
        assert name.split()[0].strip(",") in (
            "prompt",
            "response",
            "responses",
            "messages",
            "chosen",
            "rejected",
            "part",
        )


def test_fields_that_nothing_reads_are_counted_once_at_the_end() -> None:
    row = {"prompt": "q", "response": "a", "question": "x", "context": ["y"], "answer": None, "output": "", "id": "z"}
    rows = [json.dumps(row).encode() + b"\n"] * 12 + LINES.splitlines(keepends=True)
    summary = scored(rows, [])
    assert summary.unread == {"question": 12, "context": 12}
    done = run("score", BUNDLE, "-", stdin=b"".join(rows))
    assert done.returncode == 0
    assert done.stderr.splitlines()[2:] == [
        "12 rows had the field `question`, which nothing read",
        "12 rows had the field `context`, which nothing read",
    ]


def test_importing_the_command_reads_no_format_library() -> None:
    code = "import rewardrt.data.formats, sys; assert not {'pandas', 'pyarrow', 'zstandard'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
