"""A spec that contradicts itself is refused by the cause, and so is an option that a model cannot honour."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import run
from rewardrt import BundleError, RewardModel, RewardRTError
from rewardrt.bundle.spec import Output, Spec

BUNDLE = Path(__file__).parent / "bundles" / "version-1"


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return RewardModel.load(BUNDLE, provider="cpu", precision="fp32")


def changed(spec: Spec, **changes: Any) -> Spec:
    """Replace fields; those of the text rule and of the combine rule by `text_...` and `combine_...`."""
    parts: dict[str, dict[str, Any]] = {"text": {}, "combine": {}}
    whole = {}
    for name, value in changes.items():
        part, _, field = name.partition("_")
        if part in parts:
            parts[part][field] = value
        else:
            whole[name] = value
    nested = {name: replace(getattr(spec, name), **fields) for name, fields in parts.items() if fields}
    return replace(spec, **whole, **nested)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"text_type_ids": True}, "text.type_ids is set; expected an encoder that reads a pair of texts"),
        ({"input": "steps"}, "input 'steps' with tap rule .*: the input 'steps' needs the rule all_ids"),
        ({"text_step_token": "<step>"}, "with step_token '<step>': the input 'steps' needs one, other inputs may not"),
        ({"text_source": "concatenate", "text_step_layout": "turns"}, "step_layout 'turns' needs the source chat_template"),
        ({"text_step_layout": "apart"}, "step_layout 'apart' needs the source concatenate, or a format that ends with"),
        ({"text_format": "{first}{second}"}, "a pairwise model that reads two answers in one text needs {first} and {second}"),
    ],
)  # fmt: skip
def test_a_spec_that_contradicts_itself_is_refused_by_the_cause(
    model: RewardModel, changes: dict[str, Any], cause: str
) -> None:
    with pytest.raises(BundleError, match=cause) as caught:
        changed(model.spec, **changes)
    assert "\n" not in str(caught.value)


def test_two_objectives_of_one_name_are_refused() -> None:
    with pytest.raises(BundleError, match="expected names that all differ"):
        Output(labels=("kind", "kind"))


def test_an_option_that_the_model_cannot_honour_is_refused_whatever_the_call(model: RewardModel) -> None:
    rows = [{"prompt": "Name a colour.", "response": "Blue."}]
    for call in (model.score_many, model.score_rows):
        with pytest.raises(RewardRTError, match="aggregate 'min': this model gives one reward to a text"):
            call(rows, aggregate="min")
    done = run("score", BUNDLE, "--prompt", "a", "--response", "b", "--aggregate", "min")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--aggregate is for rows with steps" in done.stderr


def test_the_normalised_reward_is_the_raw_one_shifted_and_scaled(model: RewardModel) -> None:
    raw = model.score(prompt="Name a colour.", response="Blue.", normalize=False)
    affine = model.spec.normalise
    assert affine is not None
    found = model.score(prompt="Name a colour.", response="Blue.", normalize=True)
    assert np.float32(found) == np.float32((raw - affine.mean) / (affine.std + affine.eps))


def test_a_table_ranks_the_answers_of_rows_and_of_pairs_best_first(model: RewardModel, tmp_path: Path) -> None:
    prompt, answers = "Name a colour.", ["Blue.", "Seven", "A colour is blue."]
    rewards = {answer: model.score(prompt=prompt, response=answer) for answer in answers}
    rows = [
        {"prompt": prompt, "responses": answers},
        {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]},
        {"prompt": prompt},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("score", BUNDLE, tmp_path / "rows.jsonl", "--table", "--precision", "fp32")
    assert done.returncode == 1 and done.stdout.count("error: expected text, or messages") == 1
    ranked = [line.split(maxsplit=3) for line in done.stdout.splitlines() if line[:4].strip().isdigit()]
    assert [line[0] for line in ranked] == ["1", "2", "3", "1", "2"]
    marks = {answers[0]: "chosen    ", answers[1]: "rejected  ", answers[2]: ""}
    for part, shown, marked in ((answers, ranked[:3], False), (answers[:2], ranked[3:], True)):
        best_first = sorted(part, key=lambda answer: -rewards[answer])
        expected = [(marks[each] * marked + each, f"{rewards[each]:.4f}") for each in best_first]
        assert [(line[3], line[1]) for line in shown] == expected
