"""`rewardrt evaluate`: files in the benchmarks' own layouts and types, against an independent script with `score`."""

from __future__ import annotations

import json
import math
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import run
from rewardrt import RewardModel
from rewardrt.evaluate.evaluation import as_json, card_line
from rewardrt.evaluate.run import Plan
from rewardrt.evaluate.run import run as run_plan
from rewardrt.evaluate.sources import Options
from texts import make_texts

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
import pyarrow.parquet as pq  # noqa: E402

BUNDLE = Path(__file__).parent / "bundles" / "version-1"
PROMPTS, ANSWERS = make_texts(200, longest=12, seed=31), make_texts(900, longest=25, seed=32)
LONG = " ".join(make_texts(60, longest=30, seed=33))  # more than the model's 512 tokens

Row = dict[str, Any]


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return RewardModel.load(BUNDLE, provider="cpu", precision="fp32")


@pytest.fixture(scope="module")
def reward(model: RewardModel) -> Any:
    @cache
    def of(prompt: str, answer: str) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one of the texts is cut
            return model.score(prompt=prompt, response=answer)

    return of


def evaluate(path: Path, *, precision: str = "fp32", by: str | None = None, against: str | None = None) -> Any:
    """Return the evaluation of one file as JSON has it."""
    plan = Plan(BUNDLE, [str(path)], Options(by=by), "cpu", precision, against, 100)
    subject, (found,) = run_plan(plan, load, lambda model, reader: lambda summary: None)
    evaluation = json.loads(json.dumps(as_json(found), allow_nan=False))
    return evaluation | {"card": card_line(found, subject, "1"), "graph": subject.graph}


def load(path: Path, provider: Any, precision: str) -> RewardModel:
    return RewardModel.load(path, provider=provider, precision=precision)


def named(evaluation: Any) -> dict[str, Any]:
    return {number["name"]: number["value"] for number in evaluation["numbers"]}


def prompt_at(index: int) -> str:
    return f"{PROMPTS[index % 200]} {index}?"


def test_rewardbench_as_parquet(tmp_path: Path, reward: Any) -> None:
    subsets = ["alpacaeval-easy", "mt-bench-hard", "donotanswer", "math-prm", "hep-rust"]
    rows = [
        {"prompt": prompt_at(at), "chosen": ANSWERS[at], "chosen_model": "a", "rejected": ANSWERS[200 + at],
         "rejected_model": "b", "subset": subsets[at % 5], "id": at}
        for at in range(120)
    ]  # fmt: skip
    rows[3]["rejected"] = rows[3]["chosen"]  # a tie, of math-prm
    rows[4]["chosen"] = LONG
    rows[5]["prompt"] = ""  # fails
    names = ("prompt", "chosen", "chosen_model", "rejected", "rejected_model", "subset")
    schema = pa.schema([*((name, pa.string()) for name in names), ("id", pa.int64())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "filtered-00000-of-00001.parquet")
    evaluation = evaluate(tmp_path / "filtered-00000-of-00001.parquet")
    right: dict[str, list[int]] = {}
    for row in rows:
        if row["prompt"]:
            above = reward(row["prompt"], row["chosen"]) > reward(row["prompt"], row["rejected"])
            right.setdefault(row["subset"], []).append(int(above))
    accuracy = {name: sum(each) / len(each) for name, each in right.items()}
    sections = {
        "Chat": accuracy["alpacaeval-easy"],
        "Chat Hard": accuracy["mt-bench-hard"],
        "Safety": accuracy["donotanswer"],
        "Reasoning": (984 * accuracy["math-prm"] + 164 * accuracy["hep-rust"]) / (984 + 164),
    }
    expected = accuracy | sections | {"": sum(sections.values()) / 4}
    assert named(evaluation) == pytest.approx(expected, abs=1e-12)
    told = {name: evaluation[name] for name in ("rows", "scored", "failed", "ties", "truncated_texts", "prompts")}
    assert told == {"rows": 120, "scored": 119, "failed": 1, "ties": 1, "truncated_texts": 1, "prompts": 119}
    assert evaluation["failures"][0]["message"].startswith("row 6: prompt: expected at least one character")
    assert evaluation["truncated_tokens"] > 0
    assert {number["name"]: number["rows"] for number in evaluation["numbers"]}["donotanswer"] == 24
    assert evaluation["card"].startswith(f"RewardBench: {expected['']:.4f} (95% ")
    assert evaluation["card"].endswith(", 119 rows of 120, ties 1, texts cut 1; ck, fp32 on cpu, rewardrt 1")


def test_rewardbench_2_as_parquet(tmp_path: Path, reward: Any) -> None:
    rows: list[Row] = []
    for at in range(40):
        rows.append(
            {"id": str(at), "prompt": prompt_at(at), "chosen": [ANSWERS[4 * at]],
             "rejected": [ANSWERS[4 * at + each] for each in (1, 2, 3)], "subset": ("Focus", "Precise IF")[at % 2]}
        )  # fmt: skip
    rows[0]["rejected"] = rows[0]["chosen"] * 3  # four that share the top
    for at in range(12):
        for kind, right in (("ref", 1), ("tied", 2 + at % 4)):
            answers = [ANSWERS[300 + 10 * at + each] for each in range(right + 3)]
            rows.append(
                {"id": f"{kind}:{at}", "prompt": prompt_at(100 + at), "chosen": answers[:right],
                 "rejected": answers[right:], "subset": "Ties"}
            )  # fmt: skip
    for row in rows:
        row |= {"num_correct": len(row["chosen"]), "num_incorrect": len(row["rejected"])}
        row |= {"total_completions": row["num_correct"] + row["num_incorrect"], "models": ["m"] * 4}
        row |= {"additional_metadata": {"category": None, "index": 1.0}}
    metadata = pa.struct([("category", pa.string()), ("index", pa.float64())])
    texts, count = pa.list_(pa.string()), pa.int64()
    schema = pa.schema(
        [("id", pa.string()), ("prompt", pa.string()), ("chosen", texts), ("rejected", texts), ("num_correct", count),
         ("num_incorrect", count), ("total_completions", count), ("models", texts), ("subset", pa.string()),
         ("additional_metadata", metadata)]
    )  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "test.parquet")
    evaluation = evaluate(tmp_path / "test.parquet")
    results: dict[str, list[float]] = {"Focus": [], "Precise IF": []}
    ties: dict[str, dict[int, tuple[list[float], list[float]]]] = {"ref": {}, "tied": {}}
    for row in rows:
        right = [reward(row["prompt"], answer) for answer in row["chosen"]]
        wrong = [reward(row["prompt"], answer) for answer in row["rejected"]]
        if row["subset"] == "Ties":
            kind, number = row["id"].split(":")
            ties[kind][int(number)] = (right, wrong)
        else:
            scores = right + wrong
            best = max(scores)
            results[row["subset"]].append(1 / scores.count(best) if scores[0] == best else 0)
    accuracy = {kind: np.mean([min(r) > max(w) for r, w in each.values()]) for kind, each in ties.items()}
    preferred, hard, margins = [], [], []
    for number, (right, wrong) in ties["tied"].items():
        spread, gap = max(right) - min(right), min(right) - max(wrong)
        ref = min(ties["ref"][number][0]) - max(ties["ref"][number][1])
        preferred.append(gap > spread)
        hard.append(min(gap, ref) > spread)
        margins.append(math.tanh(min(gap, ref) / spread - 1))
    tied = 0.3 * accuracy["tied"] + 0.3 * accuracy["ref"] + 0.2 * np.mean(preferred) + 0.2 * np.mean(hard)
    tied += 0.01 * np.mean(margins)
    found = named(evaluation)
    assert found["Ties"] == pytest.approx(tied, abs=1e-12)
    means = {name: float(np.mean(each)) for name, each in results.items()}
    assert {name: found[name] for name in means} == pytest.approx(means, abs=1e-12)
    assert found[""] == pytest.approx((sum(means.values()) + tied) / 3, abs=1e-12)
    assert evaluation["ties"] == 1


def test_rm_bench_as_an_array(tmp_path: Path, reward: Any) -> None:
    domains = ["chat", "code", "math", "safety-refuse", "safety-response"]
    rows = [
        {"id": at, "prompt": prompt_at(at), "chosen": ANSWERS[6 * at : 6 * at + 3],
         "rejected": ANSWERS[6 * at + 3 : 6 * at + 6], "domain": domains[at % 5]}
        for at in range(60)
    ]  # fmt: skip
    path = tmp_path / "total_dataset.json"
    path.write_text(json.dumps(rows, indent=4), encoding="utf-8")
    evaluation = evaluate(path)
    tables: dict[str, Any] = {}
    for row in rows:
        table = np.array([[reward(row["prompt"], c) > reward(row["prompt"], r) for r in row["rejected"]] for c in row["chosen"]])  # fmt: skip
        tables.setdefault(row["domain"].split("-")[0], []).append(table)
    levels: dict[str, dict[str, float]] = {"hard": {}, "normal": {}, "easy": {}}
    for domain, each in tables.items():
        mean = np.mean(each, axis=0)
        levels["hard"][domain] = float(np.sum(np.triu(mean, 1)) / 3)
        levels["normal"][domain] = float(np.mean(np.diag(mean)))
        levels["easy"][domain] = float(np.sum(np.tril(mean, -1)) / 3)
    expected = {level: float(np.mean(list(each.values()))) for level, each in levels.items()}
    expected |= {domain: float(np.mean([each[domain] for each in levels.values()])) for domain in tables}
    expected[""] = float(np.mean([expected[domain] for domain in tables]))
    found = named(evaluation)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_judgebench_as_lines(tmp_path: Path, reward: Any) -> None:
    sources = ["mmlu-pro-law", "livebench-math", "livecodebench", "mmlu-pro-math"]
    rows = [
        {"pair_id": f"pair-{at}", "original_id": "1", "source": sources[at % 4], "question": prompt_at(at),
         "response_model": "m", "response_A": ANSWERS[2 * at], "response_B": ANSWERS[2 * at + 1],
         "label": ("A>B", "B>A")[at % 3 == 0]}
        for at in range(50)
    ]  # fmt: skip
    path = tmp_path / "claude.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    evaluation = evaluate(path, by="label")
    right = []
    for row in rows:
        a, b = (reward(row["question"], row[name]) for name in ("response_A", "response_B"))
        right.append(("A>B" if a > b else "B>A") == row["label"])
    groups = {
        "": range(50),
        "mmlu-pro": [at for at in range(50) if at % 4 in (0, 3)],
        "livebench-math": range(1, 50, 4),
        "A>B": [at for at in range(50) if at % 3],
        "B>A": range(0, 50, 3),
    }
    found = named(evaluation)
    expected = {name: float(np.mean([right[at] for at in of])) for name, of in groups.items()}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, with what an earlier run gave."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"id": at, "prompt": prompt_at(at), "chosen": ANSWERS[at], "rejected": ANSWERS[100 + at]} for at in range(100)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scored = path.with_name("scored.jsonl")
    done = run("score", BUNDLE, path, "-o", scored, "--provider", "cpu", "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    return scored


def test_a_model_agrees_with_its_own_rewards_of_before(pairs: Path) -> None:
    evaluation = evaluate(pairs, against="chosen_reward,rejected_reward")
    (found,) = evaluation["comparisons"]
    told = {name: found[name] for name in ("rows", "agreement", "tau", "difference", "p", "better", "largest", "flips")}
    same = {"rows": 100, "agreement": 1.0, "tau": pytest.approx(1.0), "difference": 0.0}
    assert told == same | {"p": 1.0, "better": 0, "largest": 0.0, "flips": []}
    assert found["name"] == "the rewards in chosen_reward,rejected_reward"


def test_all_graphs_are_compared_with_fp32(pairs: Path, reward: Any) -> None:
    found = evaluate(pairs, precision="all")
    assert found["graph"] == "fp32 on cpu"
    comparisons = {each["name"]: each for each in found["comparisons"]}
    assert set(comparisons) <= {"half on cpu", "int8 on cpu"}
    half = comparisons["half on cpu"]
    other = RewardModel.load(BUNDLE, provider="cpu", precision="half")
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    differences, right = [], []
    for row in rows:
        of = [other.score(prompt=row["prompt"], response=row[name]) for name in ("chosen", "rejected")]
        differences += [abs(of[0] - row["chosen_reward"]), abs(of[1] - row["rejected_reward"])]
        right.append(of[0] > of[1])
    assert half["largest"] == pytest.approx(max(differences), abs=1e-7)
    assert half["other"] == pytest.approx(np.mean(right))
    assert half["score"] == found["numbers"][0]["value"]
    assert 0 < half["largest"] < 0.1


def test_another_bundle_is_compared_too(pairs: Path) -> None:
    evaluation = evaluate(pairs, against=str(BUNDLE))
    assert evaluation["comparisons"][0]["name"].startswith("version-1, ")
    assert evaluation["comparisons"][0]["agreement"] > 0.9


def test_the_terminal_shows_the_numbers_and_a_line_for_a_model_card(pairs: Path) -> None:
    done = run("evaluate", BUNDLE, pairs, "--provider", "cpu", "--precision", "fp32", "--rows", 20)
    assert done.returncode == 0
    first, head, score, *_, card = done.stdout.splitlines()
    assert first == "Pairs: version-1, fp32 on cpu"
    assert head.split() == ["score", "95%", "interval", "rows", "ties"]
    assert score.split()[0] == "score"
    assert score.split()[-2:] == ["20", "0"]
    assert card.startswith(f"Pairs: {score.split()[1]} (95% ")


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([{"a": 1}], [], "of no known layout; the nearest is"),
        ([{"prompt": "p", "responses": ["a"], "correct": [True]}], [], "none of 1 rows can be scored; the first: row 1: "
         "responses: 1 answer; a group needs at least two to be compared"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b", "r": [1, "x"]}], ["--against", "r"], "--against r: is no bundle,"
         " and no row has such rewards; the first: row 1: r: expected 2 finite numbers, one for each of its answers; found 1"),
        ([{"problem": "p", "steps": ["a"], "label": -1}], [], "ProcessBench asks for rewards of steps"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b", "system": "s"}], [], "system: this field could change the text"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(tmp_path: Path, rows: list[Row], arguments: list[str], message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("evaluate", BUNDLE, path, *arguments, "--provider", "cpu", "--precision", "fp32")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) <= 2
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert done.stdout == ""


def test_rewards_from_elsewhere_that_are_no_numbers_are_left_out_with_a_line(tmp_path: Path) -> None:
    rows = [{"prompt": prompt_at(at), "chosen": ANSWERS[at], "rejected": ANSWERS[50 + at], "r": [1.0, 0.0]} for at in range(4)]  # fmt: skip
    rows[2]["r"] = [math.nan, 1.0]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    evaluation = evaluate(tmp_path / "rows.parquet", against="r")
    (found,) = evaluation["comparisons"]
    assert (found["rows"], found["left_out"]) == (3, 1)
    assert found["first_left_out"] == "row 3: r: expected 2 finite numbers, one for each of its answers; found nan"


def test_rows_that_are_all_ties_are_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "ties.jsonl"
    path.write_text("".join(json.dumps({"prompt": "p", "chosen": "a", "rejected": "a"}) + "\n" for _ in range(3)))
    done = run("evaluate", BUNDLE, path, "--provider", "cpu", "--precision", "fp32")
    assert done.returncode == 0
    assert "every row is a tie: the best right and the best wrong answer get the same reward" in done.stdout
    assert "only one prompt: no interval can be computed" in done.stdout
    assert done.stdout.splitlines()[2].split() == ["score", "0.0000", "-", "3", "3"]


def test_a_report_without_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from rewardrt.errors import MissingExtraError
    from rewardrt.evaluate.report import prepare

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'rewardrt\[report\]'"):
        prepare(tmp_path / "report")
