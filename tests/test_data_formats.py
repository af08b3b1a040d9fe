"""Rows of every format give the rewards of the same rows as JSONL, and their columns come out as they went in."""

from __future__ import annotations

import datetime
import gzip
import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commands import run
from rewardrt import RewardModel
from rewardrt.data.arrays import array_items
from rewardrt.data.files import Summary
from rewardrt.data.inputs import find_inputs
from rewardrt.data.jobs import Job, JobOptions
from rewardrt.data.journal import unfinished
from rewardrt.data.lines import Line, read_line
from rewardrt.data.readers import RowReader
from rewardrt.data.selection import Selection
from rewardrt.data.shards import piece_bounds, shard_bounds
from rewardrt.errors import RewardRTError
from rewardrt.ray import Scorer

BUNDLE = Path(__file__).parent / "bundles" / "version-1"
ROWS: list[dict[str, Any]] = [
    {
        "id": index,
        "prompt": f"question {index // 3}",
        "response": "yes no maybe "[: 3 + index % 11],
        "weight": index / 7,
    }
    for index in range(1500)
]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return RewardModel.load(BUNDLE, provider="cpu")


def score(model: RewardModel, inputs: list[Path | str], target: Path, **options: Any) -> Summary:
    """Score files to one as the command does; `format_name` and `resume` beside the options of a job."""
    format_name, resume = options.pop("format_name", "jsonl"), options.pop("resume", False)
    job = Job(model, RowReader(find_inputs([str(each) for each in inputs])), JobOptions(**options))
    with unfinished(target, job.identity(format_name), resume=resume) as output:
        return job.write(output, format_name)[0]


def as_file(name: str, folder: Path) -> Path:
    """Write the rows in a format; the name of the file says nothing."""
    path, table = folder / "rows", pa.Table.from_pylist(ROWS)
    if name == "Parquet":
        pq.write_table(table, path, row_group_size=400)
    elif name == "an Arrow file":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=333)
    elif name == "an Arrow stream":
        path.write_bytes(arrow_stream(table, 700))
    elif name == "a data set":
        path.mkdir()
        half = len(ROWS) // 2
        for index, part in enumerate((table.slice(0, half), table.slice(half))):
            (path / f"data-{index}.arrow").write_bytes(arrow_stream(part, 700))
        files = [{"filename": f"data-{index}.arrow"} for index in range(2)]
        (path / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "x"}))
        (path / "dataset_info.json").write_text("{}")
    elif name == "several members of gzip":
        path.write_bytes(gzip.compress(LINES[:30_000]) + gzip.compress(LINES[30_000:]))
    elif name == "zstd":
        path.write_bytes(pa.Codec("zstd").compress(LINES, asbytes=True) + pa.Codec("zstd").compress(b"", asbytes=True))
    else:
        made: dict[str, Callable[[], bytes]] = {
            "gzip": lambda: gzip.compress(LINES),
            "a JSON array": lambda: json.dumps(ROWS).encode(),
            "a pretty JSON array": lambda: b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2).encode() + b"\n",
            "a JSON array in gzip": lambda: gzip.compress(json.dumps(ROWS).encode()),
            "JSONL": lambda: LINES,
        }
        path.write_bytes(made[name]())
    return path


def arrow_stream(table: pa.Table, rows: int) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return bytes(sink.getvalue())


INPUTS = [
    "Parquet", "an Arrow file", "an Arrow stream", "a data set", "gzip", "several members of gzip", "zstd", "a JSON array",
    "a pretty JSON array", "a JSON array in gzip",
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(model: RewardModel, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("plain")
    score(model, [as_file("JSONL", folder)], folder / "out")
    return (folder / "out").read_bytes()


@pytest.mark.parametrize("name", INPUTS)
def test_every_format_gives_the_lines_that_jsonl_gives(
    model: RewardModel, plain: bytes, name: str, tmp_path: Path
) -> None:
    summary = score(model, [as_file(name, tmp_path)], tmp_path / "out")
    assert (summary.rows, summary.failed) == (1500, 0)
    assert (tmp_path / "out").read_bytes() == plain


def test_rewards_are_those_of_the_model(model: RewardModel, plain: bytes) -> None:
    found = np.array([json.loads(line)["reward"] for line in plain.splitlines()], np.float32)
    assert np.array_equal(found, model.score_many([{key: row[key] for key in ("prompt", "response")} for row in ROWS]))


@pytest.mark.parametrize("name", ["JSONL", "Parquet"])
@pytest.mark.parametrize("format_name", ["jsonl.gz", "jsonl.zst", "json", "parquet", "arrow", "datasets"])
def test_every_format_is_written(model: RewardModel, plain: bytes, name: str, format_name: str, tmp_path: Path) -> None:
    score(model, [as_file(name, tmp_path)], tmp_path / "out", format_name=format_name)
    expected = [json.loads(line) for line in plain.splitlines()]
    out = tmp_path / "out"
    if format_name == "jsonl.gz":
        assert gzip.decompress(out.read_bytes()) == plain
    elif format_name == "jsonl.zst":
        assert pa.CompressedInputStream(pa.OSFile(str(out)), "zstd").read() == plain
    elif format_name == "json":
        assert json.loads(out.read_bytes()) == expected
    else:
        table = {
            "parquet": lambda: pq.read_table(out),
            "arrow": lambda: pa.ipc.open_file(out).read_all(),
            "datasets": lambda: pa.ipc.open_stream(out / "data-00000-of-00001.arrow").read_all(),
        }[format_name]()
        kinds = [(field.name, str(field.type)) for field in table.schema]
        assert kinds == [
            ("id", "int64"), ("prompt", "string"), ("response", "string"), ("weight", "double"),
            ("reward", "float"), ("tokens", "int32"), ("truncated", "int32"), ("error", "string"),
        ]  # fmt: skip
        rewards = np.array([row["reward"] for row in expected], np.float32)
        assert np.array_equal(table["reward"].to_numpy(), rewards)
        assert table.drop(["reward", "error"]).to_pylist() == [
            {key: value for key, value in row.items() if key != "reward"} for row in expected
        ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows"]


def test_columns_keep_their_types_and_rows_their_shapes(model: RewardModel, tmp_path: Path) -> None:
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
    user = {"role": "user", "content": "hi", "name": None}
    table = pa.table(
        {
            "when": pa.array([datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)] * 3, pa.timestamp("ns", "UTC")),
            "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
            "small": pa.array([1, None, 3], pa.uint8()),
            "raw": pa.array([b"\xff", b"", None], pa.binary()),
            "messages": pa.array([[user, {"role": "assistant", "content": text, "name": None}] for text in "abc"], pa.list_(message)),
            "reward": pa.array(["old", "old", "old"]),
        }
    )  # fmt: skip
    pq.write_table(table, tmp_path / "in")
    score(model, [tmp_path / "in"], tmp_path / "out", format_name="parquet")
    out = pq.read_table(tmp_path / "out")
    assert out.schema.names == ["when", "kind", "small", "raw", "messages", "reward", "tokens", "truncated", "error"]
    for name in ("when", "kind", "small", "raw", "messages"):
        assert out[name].combine_chunks().equals(pq.read_table(tmp_path / "in")[name].combine_chunks()), name
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]} for text in "abc"]
    assert np.array_equal(out["reward"].to_numpy(), model.score_many(rows))
    score(model, [tmp_path / "in"], tmp_path / "lines")
    first = json.loads((tmp_path / "lines").read_bytes().splitlines()[0])
    assert first["when"] == "2026-01-02T00:00:00+00:00"
    assert "name" not in first["messages"][0]


def test_rows_of_several_shapes_have_one_schema(model: RewardModel, tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "responses": ["a", "bb"]},
        {"prompt": "q", "chosen": "a", "rejected": "bb"},
        {"prompt": "q", "response": "a"},
        {"prompt": "q"},
    ]
    (tmp_path / "in").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows, pa.schema([
        ("prompt", pa.string()), ("responses", pa.list_(pa.string())), ("chosen", pa.string()),
        ("rejected", pa.string()), ("response", pa.string()),
    ])), tmp_path / "in.parquet")  # fmt: skip
    score(model, [tmp_path / "in"], tmp_path / "lines", format_name="parquet")
    score(model, [tmp_path / "in.parquet"], tmp_path / "columns", format_name="parquet")
    lines, columns = pq.read_table(tmp_path / "lines"), pq.read_table(tmp_path / "columns")
    for name in ("rewards", "best", "chosen_reward", "margin", "reward", "tokens", "error"):
        assert lines[name].to_pylist() == columns[name].to_pylist(), name
        assert lines.schema.field(name).type == columns.schema.field(name).type, name
    assert [None if each is None else len(each) for each in columns["tokens"].to_pylist()] == [2, 2, 1, None]
    assert [value is None for value in columns["error"].to_pylist()] == [True, True, True, False]


def test_a_column_of_mixed_types_is_json_in_strings(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "a", "x": 1}\n{"text": "b", "x": {"y": [2]}}\n{"text": "c"}\n')
    done = run("score", BUNDLE, tmp_path / "in.jsonl", "-o", tmp_path / "out.parquet")
    assert done.returncode == 0
    assert "the column 'x' holds values of several types, and is JSON in strings" in done.stderr
    assert pq.read_table(tmp_path / "out.parquet")["x"].to_pylist() == ["1", '{"y": [2]}', None]


def test_values_that_parquet_has_no_type_for_are_json_in_strings(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "x": {}, "y": {"z": [{}]}, "n": 10**30, "e": [], "m": None},
        {"text": "b", "x": {}, "y": {"z": []}, "n": 1, "e": [], "m": None},
    ]
    (tmp_path / "in.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    done = run("score", BUNDLE, tmp_path / "in.jsonl", "-o", tmp_path / "out.parquet")
    assert done.returncode == 0, done.stderr
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["x"].to_pylist() == ["{}", "{}"]
    assert table["y"].to_pylist() == ['{"z": [{}]}', '{"z": []}']
    assert table["n"].to_pylist() == ["1000000000000000000000000000000", "1"]
    assert table["e"].to_pylist() == [[], []]
    assert table["m"].to_pylist() == [None, None]


def test_empty_parts_of_a_folder_are_left_out(model: RewardModel, plain: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"")
    (folder / "b.jsonl").write_bytes(LINES)
    assert score(model, [folder], tmp_path / "out").rows == 1500
    assert (tmp_path / "out").read_bytes() == plain


def test_files_folders_and_globs_are_read_one_after_the_other(model: RewardModel, plain: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    lines = LINES.splitlines(keepends=True)
    (folder / "b.jsonl").write_bytes(b"".join(lines[400:900]))
    (folder / "a.jsonl").write_bytes(b"".join(lines[:400]))
    (folder / "c.gz").write_bytes(gzip.compress(b"".join(lines[900:])))
    (folder / "_SUCCESS").write_bytes(b"")
    for index, inputs in enumerate(
        ([folder], [f"{folder}/*"], [folder / "a.jsonl", folder / "b.jsonl", folder / "c.gz"])
    ):
        if index == 1:
            (folder / "_SUCCESS").unlink()
        score(model, inputs, tmp_path / f"out{index}")
        assert (tmp_path / f"out{index}").read_bytes() == plain


def test_names_of_columns_are_those_of_the_input_again(model: RewardModel, plain: bytes, tmp_path: Path) -> None:
    rows = [{"id": row["id"], "question": row["prompt"], "answer": row["response"]} for row in ROWS]
    (tmp_path / "in").write_bytes(json.dumps(rows).encode())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    columns = {"prompt": "question", "response": "answer"}
    rewards = [json.loads(line)["reward"] for line in plain.splitlines()]
    score(model, [tmp_path / "in"], tmp_path / "out", columns=columns)
    found = [json.loads(line) for line in (tmp_path / "out").read_bytes().splitlines()]
    assert [row["reward"] for row in found] == rewards
    assert list(found[0]) == ["id", "question", "answer", "reward", "tokens", "truncated"]
    score(model, [tmp_path / "in.parquet"], tmp_path / "out.parquet", columns=columns, format_name="parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.names == ["id", "question", "answer", "reward", "tokens", "truncated", "error"]
    assert np.array_equal(table["reward"].to_numpy(), np.array(rewards, np.float32))
    reader = RowReader(find_inputs([str(tmp_path / "in.parquet")]))
    assert shard_bounds(reader, 1, 7, JobOptions(columns=columns).prompt_field) == (0, 216)  # 214 is within a prompt
    assert shard_bounds(reader, 1, 7, JobOptions(selection=Selection(group_by="id")).prompt_field) == (0, 214)
    with pytest.raises(RewardRTError, match=r"has no column 'query', but id, question, answer$"):
        score(model, [tmp_path / "in.parquet"], tmp_path / "none", columns={"prompt": "query"})


@pytest.mark.parametrize("name", ["JSONL", "Parquet"])
@pytest.mark.parametrize("shards", [1, 2, 7, 1500])
def test_shards_are_all_rows_and_cut_between_prompts(name: str, shards: int, tmp_path: Path) -> None:
    reader = RowReader(find_inputs([str(as_file(name, tmp_path))]))
    bounds = [shard_bounds(reader, index + 1, shards) for index in range(min(shards, 9))]
    if shards <= 9:
        assert bounds[0][0] == 0
        assert bounds[-1][1] == 1500
        assert all(left[1] == right[0] for left, right in itertools.pairwise(bounds))
    assert all(row % 3 == 0 for bound in bounds for row in bound)
    assert [start for start, _ in piece_bounds(reader, 100)] == list(range(0, 1500, 102))


@pytest.mark.parametrize("name", ["JSONL", "a JSON array", "Parquet", "an Arrow file", "a data set", "gzip"])
@pytest.mark.parametrize("skip", [0, 1, 749, 750, 1111, 1499, 1500])
def test_reading_on_from_a_row_gives_the_rest(name: str, skip: int, tmp_path: Path) -> None:
    reader = RowReader(find_inputs([str(as_file(name, tmp_path))]))
    assert [line.row for line in reader.lines(skip)] == ROWS[skip:]
    assert reader.count() == 1500


def test_rows_that_are_passed_over_are_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []

    def counted(number: int, data: bytes, word: str) -> Line:
        parsed.append(number)
        return read_line(number, data, word)

    monkeypatch.setattr("rewardrt.data.readers.read_line", counted)
    reader = RowReader(find_inputs([str(as_file("JSONL", tmp_path))]))
    assert len(list(reader.lines(1400))) == 100
    assert parsed == list(range(1401, 1501))


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
    st.integers(0, 2),
)
def test_the_items_of_any_array_are_those_that_json_reads(value: Any, layout: int) -> None:
    items = [value, {"text": 'a"]},[\\'}, value]
    data = json.dumps(items, indent=[None, 0, 3][layout], ensure_ascii=layout == 1).encode(errors="surrogatepass")
    assert [json.loads(item) for item in array_items(io.BytesIO(data), "x")] == items


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


BROKEN: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "Parquet cut short": (lambda folder: cut(as_file("Parquet", folder).read_bytes(), 0.7), "cannot be read (Parquet magic bytes not found in footer"),
    "an Arrow file cut short": (lambda folder: cut(as_file("an Arrow file", folder).read_bytes(), 0.7), "is the file whole?"),
    "an array cut short": (lambda folder: cut(json.dumps(ROWS).encode(), 0.5), "ends within the array, after item"),
    "something after an array": (lambda folder: json.dumps(ROWS).encode() + b"\n{}\n", "something follows the array"),
    "gzip cut short": (lambda folder: cut(gzip.compress(LINES), 0.5), "cannot be read after line"),
    "gzip that is damaged": (lambda folder: gzip.compress(LINES)[:6000] + b"\x00" * 50 + gzip.compress(LINES)[6050:], "is the file whole?"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_file_is_one_line_and_what_was_before_it_is_kept(name: str, tmp_path: Path) -> None:
    make, message = BROKEN[name]
    data = make(tmp_path)
    path = tmp_path / "broken"
    path.write_bytes(data)
    done = run("score", BUNDLE, path, "-o", tmp_path / "out.jsonl")
    lines = done.stderr.splitlines()
    assert done.returncode == 2
    assert len(lines) == 2
    assert lines[1].startswith(f"error: {path}: ")
    assert message in lines[1]
    assert not (tmp_path / "out.jsonl").exists()
    if "rows are safe" in lines[1]:
        kept = (tmp_path / "out.jsonl.part").read_bytes().count(b"\n")
        assert f"({kept} rows are safe in " in lines[1]
        assert kept >= 100
    assert ("rows are safe" in lines[1]) == (name not in ("Parquet cut short", "an Arrow file cut short"))


WRONG = {
    "a glob of nothing": (["{}/no*.jsonl"], "no*.jsonl: no file has such a name"),
    "an empty folder": (["{}/empty"], "empty: no file of rows is in this folder"),
    "no file": (["{}/none.jsonl"], "none.jsonl: cannot be read (No such file or directory)"),
    "other columns": (["{}/a.parquet", "{}/b.parquet"], "its column 'text' is int64, and string before"),
    "columns and lines": (["{}/a.parquet", "{}/rows.jsonl"], "rows.jsonl: has no columns, as other files have"),
    "standard input and more": (["-", "{}/rows.jsonl"], "- is standard input, and is given alone"),
    "the splits of a data set": (["{}/dict"], "dict: has the splits train, test; name one of them, as "),
    "numbers for texts": (["{}/b.parquet"], "none of the first 100 rows can be scored, and the rest was not tried; the first: text: expected a string, found int"),
    "two columns of one name": (["{}/dup.parquet"], "dup.parquet: has two columns with the name 'id'; rename one of them"),
    "a pipe and a file": (["{}/pipe", "{}/rows.jsonl"], "pipe: is a pipe, which is read once; give it alone"),
    "a data set that names no files": (["{}/saved"], "state.json: names no files as `datasets` writes them"),
    "no name": ([""], "an input has no name"),
    "a column for another": (["{}/a.parquet", "--columns", "response=text", "--columns", "text=id"], "has no column 'id', but text"),
    "a column that scoring adds": (["{}/a.parquet", "--columns", "text=reward"], "reward is named twice, or a field that scoring adds"),
    "a table of packed lines": (["{}/rows.jsonl", "--table", "--format", "jsonl.gz"], "--table shows rows of JSON; leave out --format"),
    "a folder as output": (["{}/rows.jsonl", "-o", "{}/empty"], "empty: is a folder that is there; name a file, or "),
    "no such scheme": (["nope://bucket/rows"], "nope://bucket/rows: cannot be opened (Unrecognized filesystem type"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_an_input_that_is_none_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n')
    pq.write_table(pa.table({"text": ["a"] * 120}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [1] * 120}), tmp_path / "b.parquet")
    columns = [pa.array(["a"]), pa.array([1]), pa.array(["x"])]
    pq.write_table(pa.Table.from_arrays(columns, ["text", "id", "id"]), tmp_path / "dup.parquet")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{}]}')
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    inputs, message = WRONG[name]
    done = run("score", BUNDLE, *(each.format(tmp_path) for each in inputs), stdin=b'{"text": "a"}\n')
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr.splitlines()[-1]
    assert len(done.stderr.splitlines()) <= 2


def test_a_pipe_that_is_named_is_read_once_and_whole(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(LINES)
    command = f"{sys.executable} -c 'from rewardrt.cli.app import main; main()' score {BUNDLE} <(cat {tmp_path}/rows) -o {tmp_path}/out"
    done = subprocess.run(["bash", "-c", command], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_bytes().count(b"\n") == 1500
    assert b'"error"' not in (tmp_path / "out").read_bytes()


def test_columns_that_python_has_no_type_for_are_taken_along(model: RewardModel, tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": pa.array(["a", "b"]),
            "nanoseconds": pa.array([1_000_000_001, None], pa.timestamp("ns")),
            "far": pa.array([10**12, 0], pa.timestamp("s")),
            "nowhere": pa.array([1, 2], pa.timestamp("us", "Mars/Base")),
            "long": pa.array([10**15, 1], pa.duration("s")),
            "bytes": pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pa.py_buffer(b"\xffok")),
        }
    )  # fmt: skip
    with pa.OSFile(str(tmp_path / "in"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    score(model, [tmp_path / "in"], tmp_path / "out", format_name="arrow")
    out = pa.ipc.open_file(tmp_path / "out").read_all()
    assert out.select(table.schema.names).equals(table)
    assert out["error"].to_pylist() == [None, None]
    score(model, [tmp_path / "in"], tmp_path / "lines")
    first = json.loads((tmp_path / "lines").read_bytes().splitlines()[0])
    assert first["nanoseconds"] == "1970-01-01 00:00:01.000000001"
    assert first["bytes"] == "\ufffd"
    invalid = tmp_path / "invalid"
    with pa.OSFile(str(invalid), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("text", pa.string())])) as writer:
        writer.write_table(pa.table({"text": table["bytes"]}))
    summary = score(model, [invalid], tmp_path / "rows")
    assert (summary.scored, summary.failed) == (1, 1)  # a text that is no text is not scored as another one
    lists = pa.ListArray.from_arrays(pa.array([0, 2], pa.int32()), table["bytes"].combine_chunks())
    pq.write_table(pa.table({"prompt": ["q"], "responses": lists}), invalid)
    assert score(model, [invalid], tmp_path / "rankings").failed == 1


def test_lines_that_no_column_fits_are_json_in_strings(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "response": "x", "m": "\ud800", "best": "abc", "big": 2**60},
        {"prompt": "a", "responses": ["x", "y"], "m": "b", "big": 1},
        *[{"prompt": "a", "response": "x", "big": 0.5}] * 5000,
    ]
    (tmp_path / "in.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    done = run("score", BUNDLE, tmp_path / "in.jsonl", "-o", tmp_path / "out.parquet")
    assert done.returncode == 0, done.stderr
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["m"].to_pylist()[:2] == ['"\\ud800"', '"b"']
    assert table["best"].to_pylist()[0] == '"abc"'
    assert table["big"].to_pylist()[0] == str(2**60)


def test_no_rows_are_a_whole_file_too(model: RewardModel, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"[]")
    score(model, [tmp_path / "in"], tmp_path / "out.gz", format_name="jsonl.gz")
    assert gzip.decompress((tmp_path / "out.gz").read_bytes()) == b""
    (tmp_path / "b.jsonl").write_bytes(LINES)
    assert score(model, [tmp_path / "out.gz", tmp_path / "b.jsonl"], tmp_path / "out").rows == 1500


def test_names_of_columns_may_be_their_own(model: RewardModel, plain: bytes, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(
        b'{"prompt": null, "question": "a", "response": "b"}\n{"prompt": "a", "response": "b"}\n'
    )
    score(model, [tmp_path / "in"], tmp_path / "out", columns={"prompt": "question"})
    found = [json.loads(line) for line in (tmp_path / "out").read_bytes().splitlines()]
    assert [list(row)[:2] for row in found] == [["question", "response"]] * 2
    assert found[0]["reward"] == found[1]["reward"]


def test_without_pyarrow_a_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_file("Parquet", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(RewardRTError) as caught:
        RowReader(find_inputs([str(path)]))
    assert str(caught.value) == f"{path} needs pyarrow: pip install 'rewardrt[data]'"


def test_a_line_of_20_megabytes_is_that_rows_error(model: RewardModel, tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "response": "a"},
        {"prompt": "q", "response": "word " * 4_000_000},
        {"prompt": "q", "response": "b"},
    ]
    (tmp_path / "in").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    summary = score(model, [tmp_path / "in"], tmp_path / "out")
    assert (summary.scored, summary.failed) == (2, 1)
    error = json.loads((tmp_path / "out").read_bytes().splitlines()[1])["error"]
    assert error.startswith("the text is of 20000")
    assert error.endswith("expected at most 4194304 bytes: shorten it")


def test_rows_of_a_pipe_are_read_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    monkeypatch.setattr("rewardrt.data.inputs._open_standard_input", lambda: open(reading, "rb"))  # noqa: SIM115
    lines = RowReader(find_inputs(["-"])).lines() if os.write(writing, b'{"text": "a"}\n') else iter(())
    for text in "abc":
        assert next(lines).row == {"text": text}  # and nothing after it is there yet
        os.write(writing, json.dumps({"text": chr(ord(text) + 1)}).encode() + b"\n")
    os.close(writing)
    assert [line.row for line in lines] == [{"text": "d"}]


@pytest.mark.parametrize("kind", ["table", "columns"])
def test_the_class_for_pipelines_gives_tables_with_float32_rewards(plain: bytes, kind: str) -> None:
    """As Ray calls it; `ray_tests` has a real one."""
    table = pa.Table.from_pylist(ROWS[:200])
    scorer = Scorer(BUNDLE, provider="cpu")
    given = (
        table if kind == "table" else {name: table[name].to_numpy(zero_copy_only=False) for name in table.schema.names}
    )
    out = scorer(given)
    expected = [json.loads(line)["reward"] for line in plain.splitlines()[:200]]
    assert np.array_equal(out["reward"].to_numpy(), np.array(expected, np.float32))
    assert out.schema.names == [*ROWS[0], "reward", "tokens", "truncated", "error"]
    assert scorer(table.slice(0, 0)).num_rows == 0
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
