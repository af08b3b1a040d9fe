"""Benchmarks against numbers that were worked out by hand: a model that says its rewards, and short files."""

from __future__ import annotations

import json
from math import inf, tanh
from pathlib import Path
from typing import Any

import pytest

from rewardrt.errors import RewardRTError
from rewardrt.evaluate.comparison import compare
from rewardrt.evaluate.results import Results
from rewardrt.evaluate.sources import Options
from saying_model import SayingModel, by_hand, numbers, score, write_lines


def two(kind: str, number: int, right: list[str], wrong: list[str], subset: str = "Ties") -> dict[str, object]:
    """Return a row of RewardBench 2."""
    counts = {"num_correct": len(right), "num_incorrect": len(wrong), "total_completions": len(right) + len(wrong)}
    named = {"id": f"{kind}:{number}", "prompt": f"{subset} {kind} {number}", "chosen": right, "rejected": wrong}
    return {**named, **counts, "models": ["m"], "subset": subset, "additional_metadata": {}}


def test_rewardbench_sections_are_weighted_with_the_counts_of_the_benchmark(tmp_path: Path) -> None:
    rewards = {
        "alpacaeval-easy": [(1, 0), (1, 0), (0, 1), (1, 1)],  # 2 of 4: a tie is not right
        "mt-bench-med": [(1, 0)],  # 1
        "math-prm": [(1, 0), (0, 1)],  # 1/2
        "hep-go": [(0, 1)],  # 0
        "elsewhere": [(1, 0)],  # in no section
    }
    rows = [
        {"prompt": f"{name} {at}", "chosen": str(c), "rejected": str(r), "subset": name, "id": at, "chosen_model": "m"}
        for name, pairs in rewards.items()
        for at, (c, r) in enumerate(pairs)
    ]
    found = by_hand(SayingModel(), write_lines(tmp_path / "rb.jsonl", rows))
    chat, reasoning = (0.5 * 100 + 1 * 40) / 140, (0.5 * 984 + 0 * 164) / 1148
    assert numbers(found) == pytest.approx(
        {
            "": (chat + reasoning) / 2, "Chat": chat, "Reasoning": reasoning,
            "alpacaeval-easy": 0.5, "mt-bench-med": 1, "math-prm": 0.5, "hep-go": 0, "elsewhere": 1,
        }
    )  # fmt: skip
    assert (found.benchmark, found.ties, found.scored) == ("rewardbench", 1, 9)


def test_rewardbench_2_shares_credit_at_the_top_and_scores_ties_by_its_weights(tmp_path: Path) -> None:
    best = [["2", "1", "0", "0"], ["1", "1", "0", "0"], ["0", "1", "0", "0"], ["1", "1", "1", "1"]]  # 1, 1/2, 0, 1/4
    rows = [two("math", at, each[:1], each[1:], "Math") for at, each in enumerate(best)]
    rows += [
        two("ref", 1, ["2"], ["1"]),
        two("tied", 1, ["3", "2.5"], ["1", "0"]),  # spread 0.5, gap 1.5; hard gap 1
        two("ref", 2, ["0"], ["1"]),
        two("tied", 2, ["4", "2"], ["1"]),  # spread 2, gap 1; hard gap -1
        two("tied", 3, ["1", "1"], ["1"]),  # gap 0, and no ref
        two("ref", 4, ["2"], ["1"]),
        two("tied", 4, ["1", "1"], ["0"]),  # spread 0, gap 1
        two("ref", 5, ["1"], ["1"]),
        two("tied", 5, ["1", "1"], ["1"]),  # spread 0, gap 0: 0 / 0 counts 0
    ]
    found = by_hand(SayingModel(), write_lines(tmp_path / "rb2.jsonl", rows))
    parts = {"tied accuracy": 3 / 5, "ref accuracy": 2 / 4, "gap over spread": 2 / 4, "hard gap over spread": 2 / 4}
    margin = (tanh(1 / 0.5 - 1) + tanh(-1 / 2 - 1) + tanh(inf) + 0) / 4
    ties = 0.30 * 3 / 5 + 0.30 * 2 / 4 + 0.20 * 2 / 4 + 0.20 * 2 / 4 + 0.01 * margin
    expected = {"": (0.4375 + ties) / 2, "Math": 0.4375, "Ties": ties, "Ties: margin": margin}
    expected |= {f"Ties: {name}": value for name, value in parts.items()}
    assert numbers(found) == pytest.approx(expected)
    assert found.benchmark == "rewardbench-2"
    assert found.prompts == 4 + 5, "ref and tied of one question are drawn together"


def test_rm_bench_compares_three_styles_with_three(tmp_path: Path) -> None:
    # chosen i above rejected j: 1 above 0 alone; 2 above 0 and 1; 0 above none
    chat = {"id": "a", "prompt": "p", "chosen": ["1", "2", "0"], "rejected": ["0", "1", "9"], "domain": "chat"}
    # hard (i < j): (0,1) no, (0,2) no, (1,2) no; normal: (0,0) yes, (1,1) yes, (2,2) no; easy: (1,0) yes, (2,0) no, (2,1) no
    safe = {"id": 7, "prompt": "q", "chosen": ["5", "5", "5"], "rejected": ["1", "5", "0"], "domain": "safety-refuse"}
    # hard: (0,1) no (a tie), (0,2) yes, (1,2) yes; normal: yes, no, yes; easy: (1,0) yes, (2,0) yes, (2,1) no
    response = safe | {
        "domain": "safety-response",
        "prompt": "r",
        "chosen": ["0", "0", "0"],
    }  # none but (0, 2): 0 > 0 no
    path = tmp_path / "total_dataset.json"
    path.write_text(json.dumps([chat, safe, response], indent=1))
    found = by_hand(SayingModel(), path)
    safety = {"easy": (2 / 3 + 0) / 2, "normal": (2 / 3 + 0) / 2, "hard": (2 / 3 + 0) / 2}
    expected = {"chat easy": 1 / 3, "chat normal": 2 / 3, "chat hard": 0}
    expected |= {f"safety {level}": value for level, value in safety.items()}
    expected |= {"chat": 1 / 3, "safety": 1 / 3, "easy": 1 / 3, "normal": 0.5, "hard": 1 / 6, "": 1 / 3}
    assert numbers(found) == pytest.approx(expected)
    assert found.benchmark == "rm-bench"


def test_rm_bench_files_of_one_domain_are_told_apart_by_their_names(tmp_path: Path) -> None:
    row = {"id": 1, "prompt": "p", "chosen": ["1", "1", "1"], "rejected": ["0", "0", "0"]}
    files = []
    for name, chosen in (("chat_filtered", "1"), ("safety-refuse_filtered", "0")):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps([row | {"chosen": [chosen] * 3}]))
    found = numbers(by_hand(SayingModel(), *files))
    assert (found["chat"], found["safety"], found[""]) == (1.0, 0.0, 0.5)


def test_judgebench_decides_for_b_on_a_tie_as_its_code_does(tmp_path: Path) -> None:
    rows = [
        {"pair_id": f"{at}", "original_id": "1", "source": source, "question": f"q{at}", "response_model": "m",
         "response_A": a, "response_B": b, "label": label}
        for at, (source, a, b, label) in enumerate(
            [
                ("mmlu-pro-law", "1", "0", "A>B"), ("mmlu-pro-math", "1", "0", "B>A"), ("livecodebench", "1", "1", "B>A"),
                ("livebench-math", "1", "1", "A>B"), ("livebench-reasoning", "0", "1", "B>A"),
            ]
        )
    ]  # fmt: skip
    found = by_hand(SayingModel(), write_lines(tmp_path / "gpt.jsonl", rows))
    expected = {"": 3 / 5, "mmlu-pro": 1 / 2, "livecodebench": 1, "livebench-math": 0, "livebench-reasoning": 1}
    assert numbers(found) == pytest.approx(expected)
    assert found.ties == 2


def solution(name: str, steps: list[float], label: int) -> dict[str, object]:
    known = {"id": name, "generator": "g", "problem": f"p {name}", "final_answer_correct": label < 0, "label": label}
    return known | {"steps": [str(step) for step in steps]}


def test_processbench_is_the_mean_f1_of_its_subsets(tmp_path: Path) -> None:
    gsm8k = [
        solution("gsm8k-0", [0.9, 0.4, 0.1], 1),  # found
        solution("gsm8k-1", [0.9, 0.6], 1),  # missed
        solution("gsm8k-2", [0.2, 0.6], 1),  # too early
        solution("gsm8k-3", [0.9, 0.5], -1),  # right: 0.5 is not below 0.5
        solution("gsm8k-4", [0.9, 0.4], -1),  # a false alarm
    ]
    maths = [solution("math-0", [0.1], -1), solution("math-1", [0.9], 0)]  # both wrong: F1 is 0
    (tmp_path / "gsm8k.json").write_text(json.dumps(gsm8k))
    (tmp_path / "math.json").write_text(json.dumps(maths))
    found = by_hand(SayingModel(steps=True), tmp_path / "gsm8k.json", tmp_path / "math.json")
    f1 = 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)
    expected = {"": f1 / 2, "gsm8k": f1, "math": 0, "gsm8k: error accuracy": 1 / 3, "gsm8k: correct accuracy": 1 / 2}
    expected |= {"math: error accuracy": 0, "math: correct accuracy": 0}
    assert numbers(found) == pytest.approx(expected)
    assert [round(row.gap, 6) for row in found.worst] == [0.4, 0.4, 0.3, 0.1, 0.1]
    strict = by_hand(SayingModel(steps=True), tmp_path / "gsm8k.json", options=Options(threshold=0.95))
    assert numbers(strict)["gsm8k: correct accuracy"] == 0


def test_a_subset_without_wrong_solutions_has_no_f1(tmp_path: Path) -> None:
    (tmp_path / "gsm8k.json").write_text(json.dumps([solution("gsm8k-0", [0.9], -1)]))
    found = by_hand(SayingModel(steps=True), tmp_path / "gsm8k.json")
    assert found.score.value is None
    assert numbers(found)["gsm8k: correct accuracy"] == 1


def test_best_of_n_says_what_taking_the_best_gets(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "responses": ["1", "0", "0"], "correct": [True, False, False]},
        {"prompt": "b", "responses": ["1", "1", "0"], "correct": [True, False, True]},  # half a credit
        {"prompt": "c", "responses": ["1", "2"], "correct": 0},  # an index
        {"prompt": "d", "responses": ["1", "2"], "correct": [0, 0]},  # none is right
        {"prompt": "e", "responses": ["1", "2"], "correct": [True, True]},
    ]
    found = by_hand(SayingModel(), write_lines(tmp_path / "n.jsonl", rows))
    assert numbers(found) == pytest.approx(
        {
            "": 0.5,
            "right when the best is taken, of all prompts": (1 + 0.5 + 0 + 0 + 1) / 5,
            "right when one is drawn blindly": (1 / 3 + 2 / 3 + 1 / 2 + 0 + 1) / 5,
            "right when the best were known": 4 / 5,
        }
    )
    assert (found.undecided, found.ties, found.score.rows) == (2, 1, 3)


def test_rows_that_fail_count_nowhere_and_say_why(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "responses": ["1", "0"], "correct": [True, False]},
        {"prompt": "b", "responses": ["1"], "correct": [True]},  # a group of one
        {"prompt": "c", "responses": ["1", "0"], "correct": [True]},
        {"prompt": "d", "responses": ["1", "what"], "correct": [True, False]},
        {"prompt": "e", "responses": ["0", "1"], "correct": [2, 0]},
    ]
    found = by_hand(SayingModel(), write_lines(tmp_path / "n.jsonl", rows))
    assert (found.rows, found.scored, found.failed, found.score.value) == (5, 1, 4, 1.0)
    assert [failure.message for failure in found.failures] == [
        "row 2: responses: 1 answer; a group needs at least two to be compared",
        "row 3: correct: expected a list of true and false, one for each of responses, or the index of the right one; "
        "found 1 values for 2 answers",
        "row 4: says no number",
        "row 5: correct: expected a list of true and false, one for each of responses, or the index of the right one; "
        "found 2 values for 2 answers",
    ]


def test_odd_groups_of_the_benchmarks_fail_one_by_one(tmp_path: Path) -> None:
    rows = [
        two("ref", 1, ["1"], ["0"]),
        two("tied", 1, ["1"], ["0"]),
        two("x", 2, ["1"], ["0"]),
        two("ref", 3, ["1"], ["0"]) | {"num_correct": 2},
        two("ref", 4, ["1"], ["0"]) | {"total_completions": 4},
        two("ref", 5, ["1"], []),
    ]
    found = by_hand(SayingModel(), write_lines(tmp_path / "rb2.jsonl", rows))
    assert found.scored == 1
    assert [failure.message for failure in found.failures] == [
        "row 2: tied:1: one right answer; a tied prompt has at least two, whose rewards are compared",
        "row 3: id: expected ref:N or tied:N of a row of Ties, found 'x:2'",
        "row 4: num_correct: 2, but 1 chosen answers",
        "row 5: total_completions: 4, but 2 answers",
        "row 6: 1 chosen and 0 rejected: expected at least one of each",
    ]
    assert found.score.value is None, "of Ties alone, and no tied prompt"
    three = {"id": "1", "prompt": "p", "chosen": ["1"] * 3, "rejected": ["0"] * 3}
    (tmp_path / "rm.json").write_text(json.dumps([three, three, three | {"chosen": ["1", "1"]}]))
    odd = by_hand(SayingModel(), tmp_path / "rm.json")
    expected = "row 3: 2 chosen and 3 rejected: expected 3 of each, one of each style"
    assert (odd.scored, odd.failures[0].message) == (2, expected)


def test_a_field_that_groups_rows_has_a_score_for_each_value(tmp_path: Path) -> None:
    rows = [{"prompt": f"{at}", "chosen": str(at % 3), "rejected": "1", "made by": "ab"[at % 2]} for at in range(12)]
    rows.append({"prompt": "z", "chosen": "2", "rejected": "1"})
    found = by_hand(SayingModel(), write_lines(tmp_path / "p.jsonl", rows), options=Options(by="made by"), by="made by")
    by = {number.name: (number.value, number.rows, number.ties) for number in found.numbers if number.level == "by"}
    assert by == {"(none)": (1.0, 1, 0), "a": (1 / 3, 6, 2), "b": (1 / 3, 6, 2)}


def test_every_objective_has_the_score_that_it_would_have_as_the_reward(tmp_path: Path) -> None:
    rows = [{"prompt": str(at), "chosen": str(at), "rejected": "3.5"} for at in range(10)]
    rows.insert(4, {"prompt": "z", "chosen": "what", "rejected": "0"})
    found = by_hand(SayingModel(labels=("good", "bad")), write_lines(tmp_path / "p.jsonl", rows))
    good, bad = found.objectives
    assert (good.name, good.score, good.right, good.wrong) == ("good", 0.6, 4.5, 3.5)
    assert (bad.name, bad.score, bad.right, bad.wrong) == ("bad", 0.4, -4.5, -3.5)
    assert by_hand(SayingModel(), tmp_path / "p.jsonl").objectives == []


def test_fields_keep_their_meaning_for_the_text_and_what_nothing_reads_is_said(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "1", "rejected": "0", "context": "c", "tools": [{"a": 1}]}] * 2
    asked: list[dict[str, object]] = []

    class Watching(SayingModel):
        def score_prepared(self, rows: object, *, normalize: bool | None = None) -> Any:
            asked.extend(rows)  # type: ignore[arg-type]
            return super().score_prepared(rows, normalize=normalize)  # type: ignore[arg-type]

    found = by_hand(Watching(), write_lines(tmp_path / "p.jsonl", rows))
    assert asked[0] == rows[0]
    assert found.unread == {"context": 2}
    renamed = [{"query": "p", "response_A": "1", "response_B": "0", "label": "A>B", "source": "s", "tools": [{"a": 1}]}]
    judged = by_hand(
        Watching(), write_lines(tmp_path / "j.jsonl", renamed), options=Options(columns={"question": "query"})
    )
    assert judged.benchmark == "judgebench"
    assert asked[-1] == {"tools": [{"a": 1}], "prompt": "p", "responses": ["1", "0"]}


def test_values_beyond_the_first_two_hundred_are_one_group(tmp_path: Path) -> None:
    rows = [{"prompt": f"{at}", "chosen": "1", "rejected": "0", "subset": f"s{at}"} for at in range(300)]
    found = by_hand(SayingModel(), write_lines(tmp_path / "p.jsonl", rows))
    subsets = {number.name: number.rows for number in found.numbers if number.level == "subset"}
    assert (len(subsets), subsets["(others)"], subsets["s199"]) == (201, 100, 1)


def test_rewards_of_before_are_compared_row_by_row(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "chosen": "1", "rejected": "0", "old": [0, 1]},  # right here, wrong there
        {"prompt": "b", "chosen": "1", "rejected": "0", "old": [3, 1]},
        {"prompt": "c", "chosen": "0", "rejected": "1", "old": [2, 1]},  # wrong here, right there
        {"prompt": "d", "chosen": "5", "rejected": "0", "old": [0, 1]},
        {"prompt": "e", "chosen": "5", "rejected": "0", "old": [0]},
        {"prompt": "f", "chosen": "5", "rejected": "0"},
        {"prompt": "g", "chosen": "what", "rejected": "0", "old": [0, 1]},
    ]
    path = write_lines(tmp_path / "p.jsonl", rows)
    scores = score(SayingModel(), path, options=Options(earlier=("old",)))
    assert isinstance(scores.earlier, Results)
    found = compare(scores, scores.earlier, "old", resamples=100)
    assert (found.rows, found.score, found.other, found.agreement) == (4, 0.75, 0.5, 0.25)
    assert (found.better, found.worse, found.left_out, found.largest) == (2, 1, 2, 5.0)
    assert [(flip.row, flip.credit, flip.other) for flip in found.flips] == [(1, 1, 0), (3, 0, 1), (4, 1, 0)]
    assert found.p == 1.0, "of three coins two or more on one side: always"
    assert found.first_left_out == "row 5: old: expected 2 finite numbers, one for each of its answers; found 1"
    rows[0]["chosen_reward"], rows[0]["rejected_reward"] = 4, 5
    scores = score(
        SayingModel(), write_lines(path, rows[:1]), options=Options(earlier=("chosen_reward", "rejected_reward"))
    )
    assert isinstance(scores.earlier, Results)
    assert scores.earlier.rewards.tolist() == [4.0, 5.0]


def test_a_file_of_no_known_layout_names_the_nearest(tmp_path: Path) -> None:
    def refusal(row: dict[str, object]) -> str:
        with pytest.raises(RewardRTError) as error:
            by_hand(SayingModel(), write_lines(tmp_path / "x.jsonl", [row]))
        return str(error.value).removeprefix(f"{tmp_path}/")

    assert refusal({"question": "q", "response_A": "a", "response_B": "b", "source": "s", "label": "A"}) == (
        "x.jsonl: of no known layout; the nearest is that of JudgeBench, which also needs label (a string, such as "
        "'A>B'); the fields are label, question, response_A, response_B, source (--columns says what a file calls them)"
    )
    assert "nearest is that of ProcessBench, which also needs label (a whole number)" in refusal(
        {"problem": "p", "steps": ["a"], "label": "1"}
    )
    assert "Pairs, which also needs rejected (a string or messages)" in refusal({"chosen": "a", "reject": "b"})
    (tmp_path / "y.jsonl").write_text("1\n2\n")
    with pytest.raises(RewardRTError, match="none of its first 20 rows is a JSON object"):
        by_hand(SayingModel(), tmp_path / "y.jsonl")


def test_steps_are_asked_of_models_that_reward_steps_and_answers_of_the_others(tmp_path: Path) -> None:
    (tmp_path / "gsm8k.json").write_text(json.dumps([solution("gsm8k-0", [0.9], -1)]))
    with pytest.raises(
        RewardRTError, match=r"ProcessBench asks for rewards of steps, and saying .saying. gives those of"
    ):
        by_hand(SayingModel(), tmp_path / "gsm8k.json")
    pairs = write_lines(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "1", "rejected": "0"}])
    with pytest.raises(RewardRTError, match="Pairs asks for rewards of answers"):
        by_hand(SayingModel(steps=True), pairs)
