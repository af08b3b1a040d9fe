"""JSONL files: line n out is line n in, byte for byte what it should be, and nothing is half written."""

from __future__ import annotations

import io
import json
import os
import random
import stat
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from rewardrt.data import files
from rewardrt.data.files import Summary, score_file
from rewardrt.data.lines import Line, read_lines
from rewardrt.data.outputs import open_output
from rewardrt.errors import InferenceError, RewardRTError, RowError
from rewardrt.scoring.answers import flatten, read_rows, regroup
from rewardrt.scoring.scored import Scored, ScoredRow
from rewardrt.text.items import Conversation, Input, RawText
from rewardrt.text.rows import Row

Rows = list[Row | RewardRTError]
Results = list[ScoredRow | RewardRTError]


def score(rows: Rows) -> Results:
    """Reward: characters of the text or answer, over 8. Refuses "bad"; cuts at 6 characters."""
    results: list[Scored | RewardRTError] = []
    for item in flatten(rows):
        text = item.text if isinstance(item, RawText) else item.answer["content"]
        long = max(0, len(text) - 6)
        results.append(RowError("no such text") if text == "bad" else Scored(len(text) / 8, len(text) - long, long))
    return regroup(rows, results)


def run(data: bytes, **options: int) -> tuple[bytes, Summary]:
    out: list[bytes] = []
    summary = score_file(read_rows, score, read_lines(io.BytesIO(data)), out.append, **options)  # type: ignore[arg-type]
    return b"".join(out), summary


def error_of(data: bytes) -> str:
    out, summary = run(data)
    assert (summary.rows, summary.failed, out.count(b"\n")) == (1, 1, 1)
    row = json.loads(out)
    assert list(row)[-1] == "error"
    return str(row["error"])


def test_a_file_is_scored_in_order_with_every_kind_of_row() -> None:
    data = (
        b'{"id": 1, "text": "abc"}\n'
        b"\n"
        b'{"prompt": "Q", "responses": ["a", "abcdefgh"], "n": 1.5}\r\n'
        b'{"prompt": "Q", "chosen": "ab", "rejected": "a"}\n'
        b'{"prompt": "Q", "chosen": "a", "rejected": "ab"}\n'
        b'{"prompt": "Q", "chosen": "a", "rejected": "b", "x": "\xc3\xa9\\u00e9\xe2\x80\xa8"}\n'
        b'{"prompt": "Q", "response": "bad", "reward": 1}\n'
        b'{"prompt": "Q", "responses": ["a", "bad", "b", "bad"]}\n'
        b'{"prompt": "Q"}'
    )
    expected = (
        b'{"id": 1, "text": "abc", "reward": 0.375, "tokens": 3, "truncated": 0}\n'
        b'{"error": "line 2: blank line; expected a JSON object"}\n'
        b'{"prompt": "Q", "responses": ["a", "abcdefgh"], "n": 1.5, "rewards": [0.125, 1.0], "best": 1, '
        b'"tokens": [1, 6], "truncated": [0, 2]}\n'
        b'{"prompt": "Q", "chosen": "ab", "rejected": "a", "chosen_reward": 0.25, "rejected_reward": 0.125, '
        b'"margin": 0.125, "tokens": [2, 1], "truncated": [0, 0]}\n'
        b'{"prompt": "Q", "chosen": "a", "rejected": "ab", "chosen_reward": 0.125, "rejected_reward": 0.25, '
        b'"margin": -0.125, "tokens": [1, 2], "truncated": [0, 0]}\n'
        b'{"prompt": "Q", "chosen": "a", "rejected": "b", "x": "\xc3\xa9\xc3\xa9\xe2\x80\xa8", "chosen_reward": 0.125, '
        b'"rejected_reward": 0.125, "margin": 0.0, "tokens": [1, 1], "truncated": [0, 0]}\n'
        b'{"prompt": "Q", "response": "bad", "error": "no such text"}\n'
        b'{"prompt": "Q", "responses": ["a", "bad", "b", "bad"], '
        b'"error": "responses[1]: no such text; responses[3]: no such text"}\n'
        b'{"prompt": "Q", "error": "expected text, or messages ending with the assistant, or one of prompt and messages '
        b'with response, with responses, with steps, or with chosen and rejected; found prompt"}\n'
    )
    summary = Summary(
        rows=9,
        read=9,
        scored=5,
        failed=4,
        texts=9,
        tokens=18,
        truncated_texts=1,
        pairs=3,
        pairs_right=1,
        ties=1,
        shapes=["single", "ranking", "pair"],
    )
    for window in (1, 2, 3, 100):
        assert run(data, window=window) == (expected, summary)


def test_scoring_the_output_again_changes_nothing() -> None:
    once, _ = run(b'{"text": "abc", "id": 1}\n{"prompt": "Q", "chosen": "a", "rejected": "bad"}\n')
    assert run(once)[0] == once


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b" \t\r\n", "line 1: blank line; expected a JSON object"),
        (b"\xef\xbb\xbf\n", "line 1: blank line; expected a JSON object"),
        (b"[1]", "line 1: expected a JSON object, found list"),
        (b'"text"', "line 1: expected a JSON object, found str"),
        (b"null", "line 1: expected a JSON object, found NoneType"),
        (b"{'text': 1}", "line 1: not JSON (Expecting property name enclosed in double quotes at character 2); expected a JSON object"),
        (b'{"text": "x"', "line 1: not JSON (Expecting ',' delimiter at character 13); expected a JSON object"),
        (b'{"text": "x"} {}', "line 1: not JSON (Extra data at character 15); expected a JSON object"),
        (b'{"text": "\xff"}', "line 1: expected UTF-8, found the byte 0xff at byte 11"),
        (b'{"text": "\xed\xa0\x80"}', "line 1: expected UTF-8, found the byte 0xed at byte 11"),
        ('{"text": "x"}'.encode("utf-16"), "line 1: expected UTF-8, found the byte 0xff at byte 1"),
        (b'{"text": "x", "a": NaN}', "line 1: holds NaN, which is no number that JSON can carry; write null or a string"),
        (b'{"text": "x", "a": [-Infinity]}', "line 1: holds -Infinity, which is no number that JSON can carry; write null or a string"),
        (b'{"text": "x", "a": 1e999}', "line 1: holds 1e999, which is no number that JSON can carry; write null or a string"),
        (b'{"text": "x", "a": ' + b"9" * 5000 + b"}", "line 1: holds an integer of too many digits; write it as a string"),
        (b'{"a": ' + b"[" * 10**6 + b"]" * 10**6 + b"}", "line 1: nested too deeply; expected a JSON object of fewer levels"),
        (b"[" * 10**6, "line 1: nested too deeply; expected a JSON object of fewer levels"),
        (b'{"text": "a\\ud800"}', "text: expected text that can be encoded as UTF-8, found the lone surrogate U+D800 at character 2"),
        (b'{"text": "a\x00"}', "line 1: not JSON (Invalid control character at at character 12); expected a JSON object"),
    ],
)  # fmt: skip
def test_a_damaged_line_becomes_one_error_row(line: bytes, message: str) -> None:
    assert error_of(line) == message


def test_a_byte_order_mark_is_taken_off_the_first_line_only() -> None:
    out, _ = run(b'\xef\xbb\xbf{"text": "x"}\r\n\xef\xbb\xbf{"text": "x"}\r\n')
    first, second = out.splitlines()
    assert first == b'{"text": "x", "reward": 0.125, "tokens": 1, "truncated": 0}'
    assert b"line 2: not JSON (Unexpected UTF-8 BOM" in second


def test_a_surrogate_in_another_field_is_kept_as_an_escape() -> None:
    out, _ = run(b'{"text": "\xc3\xa9", "x": "\\ud800"}')
    assert out == b'{"text": "\\u00e9", "x": "\\ud800", "reward": 0.125, "tokens": 1, "truncated": 0}\n'


def test_the_last_of_doubled_fields_counts() -> None:
    assert run(b'{"text": "abc", "text": "x"}')[0] == b'{"text": "x", "reward": 0.125, "tokens": 1, "truncated": 0}\n'


def test_a_line_of_several_megabytes_is_scored() -> None:
    out, summary = run(json.dumps({"text": "é" * 3_000_000}, ensure_ascii=False).encode())
    assert (summary.scored, json.loads(out)["truncated"]) == (1, 3_000_000 - 6)


def test_an_empty_file_gives_an_empty_file() -> None:
    assert run(b"") == (b"", Summary())


def test_what_is_nested_as_deeply_as_can_be_read_can_be_written() -> None:
    for before, after in (
        (b'{"text": "x", "a": ', b"}"),
        (b'{"response": "x", "prompt": [{"role": "user", "content": "Q", "a": ', b"}]}"),
    ):
        runs = [run(before + b"[" * depth + b"]" * depth + after) for depth in range(100, 201)]
        assert [out.count(b"\n") for out, _ in runs] == [1] * 101
        assert {summary.scored for _, summary in runs} == {0, 1}
        refused = [json.loads(out)["error"] for out, summary in runs if summary.failed]
        assert set(refused) == {"line 1: nested too deeply; expected a JSON object of fewer levels"}


def test_any_bytes_give_as_many_lines_out_as_in() -> None:
    chance = random.Random(0)
    pieces = [b"\n", b"\n\n", b"\r\n", b"\r", b" ", b"{}", b'{"text": "x"}', b'{"prompt": "Q", "response": "bad"}', b"\xff",
              b"\xef\xbb\xbf", b"{", b"]", b'"', b"\\", b"\x00", b"NaN", b"1e999", "é\u2028\x85".encode(), b"\x0b\x0c\x1c"]  # fmt: skip
    for _ in range(500):
        data = b"".join(chance.choices(pieces, k=chance.randrange(40)))
        out, summary = run(data, window=chance.randrange(1, 5))
        lines = out.split(b"\n")
        assert lines.pop() == b""
        assert len(lines) == summary.rows == len(list(io.BytesIO(data)))
        for row in map(json.loads, lines):
            assert ("error" in row) != ("reward" in row)


def test_a_line_knows_its_number_and_its_size() -> None:
    lines = list(read_lines(io.BytesIO(b'{"a": 1}\n\n')))
    assert lines[0] == Line(1, 9, {"a": 1})
    assert (lines[1].number, lines[1].bytes, str(lines[1].row)) == (2, 1, "line 2: blank line; expected a JSON object")


def test_a_window_is_one_call_and_bounded_in_rows_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WINDOW_BYTES", 40)
    calls: list[int] = []
    seen: list[int] = []

    def counting(rows: Rows) -> Results:
        calls.append(len(flatten(rows)))
        return score(rows)

    data = (
        b'{"text": "a"}\n' * 7
        + b'{"text": "'
        + b"x" * 100
        + b'"}\n'
        + b'{"prompt": "Q", "responses": ["a", "b"]}\n{}\n'
    )
    out: list[bytes] = []
    score_file(
        read_rows,
        counting,
        read_lines(io.BytesIO(data)),
        out.append,
        window=4,
        progress=lambda summary: seen.append(summary.rows),
    )
    assert calls == [3, 3, 2, 2, 0]  # 14 bytes a row; the long line closes a window; the last row has no text
    assert seen == [3, 6, 8, 9, 10]
    assert len(out) == 10


def test_reading_is_one_window_ahead_of_the_one_that_is_scored() -> None:
    written: list[bytes] = []
    prepared = [threading.Event() for _ in range(6)]
    windows = iter(range(5))

    def lines() -> Iterator[Line]:
        for number in range(1, 10):
            assert len(written) >= number - 4  # two windows: that which is scored, and that which is read
            yield Line(number, 1, {"text": "x"})
        prepared[5].set()

    def prepare(rows: Iterable[object]) -> Rows:
        prepared[next(windows)].set()
        return read_rows(rows)

    def patient(rows: Rows) -> Results:
        assert prepared[len(written) // 2 + 1].wait(10), "the next window is not read while this one is scored"
        return score(rows)

    score_file(prepare, patient, lines(), written.append, window=2)
    assert len(written) == 9


def test_an_error_of_reading_comes_after_what_was_read_before_it() -> None:
    written: list[bytes] = []

    def lines() -> Iterator[Line]:
        yield Line(1, 1, {"text": "x"})
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        score_file(read_rows, score, lines(), written.append, window=1)
    assert len(written) == 1


def test_a_stop_iteration_of_the_preparation_does_not_end_the_file_early() -> None:
    def prepare(rows: Iterable[object]) -> Rows:
        raise StopIteration

    with pytest.raises(RuntimeError, match="StopIteration"):
        score_file(prepare, score, read_lines(io.BytesIO(b'{"text": "x"}')), lambda _: None)


def test_a_process_that_is_interrupted_does_not_wait_for_its_input() -> None:
    code = """
import sys
from rewardrt.data.files import score_file
from rewardrt.data.lines import read_lines
def score(items):
    print("scoring", file=sys.stderr, flush=True)
    raise KeyboardInterrupt
score_file(list, score, read_lines(sys.stdin.buffer), print, window=1)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write(b'{"text": "x"}\n')
    process.stdin.flush()  # and is left open: the reader waits for the next line
    assert process.stderr.readline() == b"scoring\n"
    try:
        assert process.wait(timeout=20) != 0
    finally:
        process.kill()
        process.stdin.close()
        process.stderr.close()


def test_an_error_of_the_scorer_itself_is_not_swallowed() -> None:
    def broken(rows: Rows) -> Results:
        raise InferenceError("out of memory")

    with pytest.raises(InferenceError, match=r"^out of memory$"):
        score_file(read_rows, broken, read_lines(io.BytesIO(b'{"text": "x"}')), lambda _: None)


def test_items_are_parsed_conversations() -> None:
    got: list[Input] = []

    def keep(rows: Rows) -> Results:
        got.extend(flatten(rows))
        return score(rows)

    score_file(read_rows, keep, read_lines(io.BytesIO(b'{"prompt": "Q", "response": "A"}')), lambda _: None)
    assert got == [Conversation("Q", {"role": "assistant", "content": "A"})]


def test_the_output_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"old")
    with open_output(path) as stream:
        stream.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out.jsonl"]


@pytest.mark.parametrize("error", [RowError("x"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), open_output(str(path)) as stream:  # noqa: PT012
        stream.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_a_file_may_be_scored_onto_itself(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "x"}\n')
    with path.open("rb") as source, open_output(path) as stream:
        score_file(read_rows, score, read_lines(source), stream.write)
    assert path.read_bytes() == b'{"text": "x", "reward": 0.125, "tokens": 1, "truncated": 0}\n'


def test_permissions_are_those_of_an_ordinary_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with open_output(tmp_path / "out.jsonl"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.jsonl").stat().st_mode) == 0o640


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"old")
    path.chmod(0o600)
    with open_output(path) as stream:
        stream.write(b"new")
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"new", 0o600)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "data" / "real.jsonl")
    with open_output(tmp_path / "link.jsonl") as stream:
        stream.write(b"new")
    assert (tmp_path / "link.jsonl").is_symlink()
    assert (tmp_path / "data" / "real.jsonl").read_bytes() == b"new"


def test_a_device_is_written_to_and_not_replaced() -> None:
    with open_output("/dev/null") as stream:
        stream.write(b"gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_failing_stream_keeps_a_device_in_place() -> None:
    with pytest.raises(RowError), open_output("/dev/null"):
        raise RowError("x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/out.jsonl", "No such file or directory"),
        ("", "Is a directory"),
        ("file/out.jsonl", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("a\0b", "embedded null byte"),
    ],
)
def test_a_path_that_cannot_be_written_is_one_line(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = f"{tmp_path}/{name}"
    with pytest.raises(RewardRTError) as caught, open_output(path):
        raise AssertionError("never reached")
    shown = str(path).replace("\0", r"\x00")
    assert str(caught.value) == f"{shown}: cannot be written ({reason}); name a file in a writable folder"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_device_is_one_line() -> None:
    message = r"^/dev/full: cannot be written \(No space left on device\);"
    with pytest.raises(RewardRTError, match=message), open_output("/dev/full") as stream:
        stream.write(b"new")


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(RewardRTError, match="No space left on device"), open_output(tmp_path / "out.jsonl") as stream:
        stream.write(b"new")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", [None, "-"])
def test_no_path_is_standard_output(path: str | None, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    stream: BinaryIO
    with open_output(path) as stream:
        stream.write(b"\xc3\xa9\n")
    assert capfdbinary.readouterr().out == b"\xc3\xa9\n"
