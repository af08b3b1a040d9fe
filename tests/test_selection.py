"""A data filter: what is kept of scored rows, held against the choice made by hand from all rewards."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from commands import run
from rewardrt import RewardModel
from rewardrt.data.files import Summary
from rewardrt.data.inputs import find_inputs
from rewardrt.data.jobs import Job, JobOptions
from rewardrt.data.journal import unfinished
from rewardrt.data.readers import RowReader
from rewardrt.data.selection import Selection
from rewardrt.data.shards import shard_bounds
from rewardrt.errors import RewardRTError

BUNDLE = Path(__file__).parent / "bundles" / "version-1"
CHANCE = random.Random(0)
FLAT = [
    {"pid": index // 4, "prompt": f"question {index // 4}", "response": "".join(CHANCE.choices("abc ", k=9)), "model": f"m{index % 4}"}
    for index in range(400)
]  # fmt: skip
LISTS = [
    {"prompt": FLAT[index]["prompt"], "responses": [row["response"] for row in FLAT[index : index + 4]], "id": index}
    for index in range(0, 400, 4)
]


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return RewardModel.load(BUNDLE, provider="cpu")


@pytest.fixture(scope="module")
def rewards(model: RewardModel) -> list[list[float]]:
    """The rewards of each prompt's four answers, as JSON has them."""
    flat = [
        float(str(value))
        for value in model.score_many([{name: row[name] for name in ("prompt", "response")} for row in FLAT])
    ]  # type: ignore[arg-type]
    return [flat[index : index + 4] for index in range(0, 400, 4)]


def kept(
    model: RewardModel, rows: list[dict[str, Any]], selection: Selection, folder: Path, kind: str
) -> tuple[list[dict[str, Any]], Summary]:
    """Score rows from lines to lines, or from columns to columns, and return the rows that come out."""
    path, out = folder / "in", folder / f"out{len(list(folder.iterdir()))}"
    if kind == "lines":
        path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    job = Job(model, RowReader(find_inputs([str(path)])), JobOptions(selection=selection))
    format_name = "jsonl" if kind == "lines" else "parquet"
    with unfinished(out, job.identity(format_name), resume=False) as output:
        summary, _ = job.write(output, format_name)
    if kind == "lines":
        return [json.loads(line) for line in out.read_bytes().splitlines()], summary
    found = pq.read_table(out).to_pylist()
    return [
        {name: value for name, value in row.items() if name != "error" or value is not None} for row in found
    ], summary


def same(found: Any, expected: Any) -> bool:
    """Compare rows; a float32 of a column is near the decimal that JSON has for it."""
    if isinstance(expected, float):
        return bool(abs(found - expected) <= 1e-6 * max(1.0, abs(expected)))
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[name], expected[name]) for name in expected)
    return bool(found == expected)


KINDS = pytest.mark.parametrize("kind", ["lines", "columns"])


@KINDS
def test_the_best_of_answers_in_a_list(
    model: RewardModel, rewards: list[list[float]], kind: str, tmp_path: Path
) -> None:
    found, summary = kept(model, LISTS, Selection(best=True), tmp_path, kind)
    assert (summary.rows, len(found)) == (100, 100)
    for row, given, values in zip(found, LISTS, rewards, strict=True):
        best = values.index(max(values))
        assert list(row) == ["prompt", "response", "id", "reward", "tokens", "truncated"]
        assert (row["response"], row["id"]) == (given["responses"][best], given["id"])
        assert same(row["reward"], values[best])


@KINDS
@pytest.mark.parametrize("top", [1, 2, 4, 9])
def test_the_first_k_of_answers_in_a_list(
    model: RewardModel, rewards: list[list[float]], kind: str, top: int, tmp_path: Path
) -> None:
    found, _ = kept(model, LISTS, Selection(top=top), tmp_path, kind)
    for row, given, values in zip(found, LISTS, rewards, strict=True):
        order = sorted(range(4), key=lambda index: -values[index])[:top]
        assert row["responses"] == [given["responses"][index] for index in order]
        assert same(row["rewards"], [values[index] for index in order])
        assert (row["best"], len(row["tokens"])) == (0, len(order))


@KINDS
def test_flat_rows_of_one_prompt_become_a_ranking(
    model: RewardModel, rewards: list[list[float]], kind: str, tmp_path: Path
) -> None:
    found, summary = kept(model, FLAT, Selection(group_by="pid"), tmp_path, kind)
    assert (summary.rows, summary.read, len(found)) == (100, 400, 100)
    for index, (row, values) in enumerate(zip(found, rewards, strict=True)):
        assert list(row) == ["pid", "prompt", "responses", "model", "rewards", "best", "tokens", "truncated"]
        assert (row["pid"], row["prompt"], row["model"]) == (index, f"question {index}", ["m0", "m1", "m2", "m3"])
        assert row["responses"] == LISTS[index]["responses"]
        assert same(row["rewards"], values)


@KINDS
def test_the_best_of_a_group_is_its_own_row_again(
    model: RewardModel, rewards: list[list[float]], kind: str, tmp_path: Path
) -> None:
    found, _ = kept(model, FLAT, Selection(group_by="pid", best=True), tmp_path, kind)
    for index, (row, values) in enumerate(zip(found, rewards, strict=True)):
        best = values.index(max(values))
        expected = FLAT[4 * index + best] | {"reward": values[best], "tokens": row["tokens"], "truncated": 0}
        assert same(row, expected)


@KINDS
def test_the_first_k_of_a_group(model: RewardModel, rewards: list[list[float]], kind: str, tmp_path: Path) -> None:
    found, _ = kept(model, FLAT, Selection(group_by="pid", top=2), tmp_path, kind)
    for index, (row, values) in enumerate(zip(found, rewards, strict=True)):
        order = sorted(range(4), key=lambda index: -values[index])[:2]
        assert row["model"] == [f"m{each}" for each in order]
        assert row["responses"] == [LISTS[index]["responses"][each] for each in order]
        assert same(row["rewards"], [values[each] for each in order])


@KINDS
def test_a_margin_is_between_the_best_two_or_of_the_chosen_one(
    model: RewardModel, rewards: list[list[float]], kind: str, tmp_path: Path
) -> None:
    margins = [sorted(values)[-1] - sorted(values)[-2] for values in rewards]
    least = sorted(margins)[50]
    found, summary = kept(model, LISTS, Selection(min_margin=least, best=True), tmp_path, kind)
    expected = [row["id"] for row, margin in zip(LISTS, margins, strict=True) if margin >= least]
    assert abs(len(found) - len(expected)) <= 1  # of the one whose margin it is, in float32 and in decimals
    assert {row["id"] for row in found} ^ set(expected) <= {LISTS[margins.index(least)]["id"]}
    assert summary.left_out == 100 - len(found)
    pairs = [{"prompt": row["prompt"], "chosen": row["responses"][0], "rejected": row["responses"][1]} for row in LISTS]
    found, _ = kept(model, pairs, Selection(min_margin=0.0), tmp_path, kind)
    assert [row["prompt"] for row in found] == [
        row["prompt"] for row, values in zip(LISTS, rewards, strict=True) if values[0] >= values[1]
    ]


def test_what_cannot_be_grouped_or_has_no_margin_is_said(model: RewardModel, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [*FLAT[:4], {"prompt": "no group"}, *FLAT[4:8]]
    found, summary = kept(model, rows, Selection(group_by="pid", best=True), tmp_path, "lines")
    assert [row.get("error", "") for row in found] == ["", "row 5: has no 'pid', which rows are grouped by", ""]
    assert found[1]["prompt"] == "no group"
    other = [FLAT[0], FLAT[1] | {"prompt": "another"}]
    for best, rows_out in ((False, 1), (True, 2)):
        found, _ = kept(model, other, Selection(group_by="pid", best=best), tmp_path, "lines")
        assert [row["error"] for row in found] == [
            "row 1: the 2 rows of its group do not have the same 'prompt'"
        ] * rows_out
    with pytest.raises(RewardRTError, match="row 3: pid 0 comes again after other rows; sort the rows by it"):
        kept(model, [FLAT[0], FLAT[4], FLAT[1]], Selection(group_by="pid"), tmp_path, "lines")
    single = [{"prompt": "a", "response": "b"}]
    found, summary = kept(model, single, Selection(min_margin=0.1), tmp_path, "columns")
    assert found[0]["error"].startswith("the row has one answer, and so no margin")
    assert summary.failed == 1


def test_the_command_filters(tmp_path: Path, rewards: list[list[float]]) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in FLAT))
    least = sorted(sorted(values)[-1] - sorted(values)[-2] for values in rewards)[30]
    done = run("score", BUNDLE, tmp_path / "in.jsonl", "--group-by", "pid", "--best", "--min-margin", str(least))
    assert done.returncode == 0
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert f"{100 - len(found)} rows were left out, by their margins" in done.stderr
    assert all(same(row["reward"], max(rewards[row["pid"]])) for row in found)
    assert run("score", BUNDLE, tmp_path / "in.jsonl", "--best", "--top", "2").returncode == 2


@KINDS
def test_the_best_of_rows_with_one_answer_or_several(
    model: RewardModel, rewards: list[list[float]], kind: str, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "question 0", "responses": LISTS[0]["responses"], "response": None},
        {"prompt": "q", "responses": None, "response": "alone"},
    ]
    found, _ = kept(model, rows, Selection(best=True), tmp_path, kind)
    best = rewards[0].index(max(rewards[0]))
    assert [row["response"] for row in found] == [LISTS[0]["responses"][best], "alone"]
    assert same(found[0]["reward"], max(rewards[0]))
    assert list(found[0]).count("response") == 1


def test_the_best_of_a_group_has_no_fields_of_the_others(model: RewardModel, tmp_path: Path) -> None:
    rows = [
        {"pid": 1, "prompt": "a", "response": "x", "best": "mine", "only_first": 1},
        {"pid": 1, "prompt": "a", "response": "no", "extra": {"k": 1}},
    ]
    found, _ = kept(model, rows, Selection(group_by="pid", best=True), tmp_path, "lines")
    own = {name: value for name, value in found[0].items() if name not in ("reward", "tokens", "truncated")}
    assert own in rows


@KINDS
@pytest.mark.parametrize("field", ["text", "response"])
def test_rows_that_cannot_be_ranked_are_not_grouped(model: RewardModel, kind: str, field: str, tmp_path: Path) -> None:
    rows = [{"text": "a", "id": index} for index in range(2)] if field == "text" else FLAT[:2]
    found, summary = kept(model, rows, Selection(group_by=field, best=True), tmp_path, kind)
    assert summary.scored == 0
    assert all("has no response to rank" in row["error"] for row in found)


def test_the_k_best_of_a_list_of_fixed_size(model: RewardModel, tmp_path: Path) -> None:
    lists = pa.array([row["responses"] for row in LISTS[:5]], pa.list_(pa.string(), 4))
    pq.write_table(pa.table({"prompt": [row["prompt"] for row in LISTS[:5]], "responses": lists}), tmp_path / "in")
    job = Job(model, RowReader(find_inputs([str(tmp_path / "in")])), JobOptions(selection=Selection(top=2)))
    with unfinished(tmp_path / "out", job.identity("parquet"), resume=False) as output:
        job.write(output, "parquet")
    assert [len(row) for row in pq.read_table(tmp_path / "out")["responses"].to_pylist()] == [2] * 5


@pytest.mark.parametrize("shards", [2, 3])
def test_a_group_with_an_unreadable_row_in_it_is_in_one_shard(shards: int, tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in FLAT[:12]]
    lines.insert(2, "{bad")
    lines.insert(7, json.dumps({"pid": None, "prompt": "a", "response": "b"}))
    (tmp_path / "in").write_text("\n".join(lines) + "\n")
    reader = RowReader(find_inputs([str(tmp_path / "in")]))
    bounds = [shard_bounds(reader, index + 1, shards, "pid") for index in range(shards)]
    groups = [
        {row.get("pid") for line in list(reader.lines())[start:stop] for row in [line.fields]} - {None}
        for start, stop in bounds
    ]
    assert sum(map(len, groups)) == 3


def test_a_margin_that_is_shown_is_a_margin_that_is_kept(model: RewardModel, tmp_path: Path) -> None:
    pairs = [{"prompt": row["prompt"], "chosen": row["responses"][0], "rejected": row["responses"][1]} for row in LISTS]
    shown = [row["margin"] for row in kept(model, pairs, Selection(), tmp_path, "lines")[0]]
    for least in shown[:10]:
        found, _ = kept(model, pairs, Selection(min_margin=least), tmp_path, "lines")
        assert len(found) == sum(margin >= least for margin in shown)
