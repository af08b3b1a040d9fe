"""A reward model that is in no table goes through --spec without a line of code; --explain writes such files."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints import make_tokenizer, write_judge, write_openrlhf
from commands import run
from rewardrt import RewardModel, RewardRTError
from rewardrt.bundle.spec import Affine, Head, Layer, Tap, TextRule, from_json
from rewardrt_export.explain import to_toml
from rewardrt_export.families import FAMILIES, Draft
from rewardrt_export.pipeline import export
from rewardrt_export.source.folder import read_source
from texts import make_texts

HEADS = (Head((Layer("score.weight"),)),)
# The page's example: mean of the last four tokens, a two-layer tanh head without bias, minus a constant for each
# attribute, then their weights.
PAGE = Path(__file__).parent.parent / "docs" / "spec-file.md"
MADE_UP = PAGE.read_text(encoding="utf-8").partition("```toml\n")[2].partition("```")[0]


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module, torch.Tensor, torch.Tensor]:
    folder = tmp_path_factory.mktemp("made-up") / "rm"
    model, up, down = write_judge(folder)
    (folder.parent / "my_rm.toml").write_text(MADE_UP)
    return folder, model, up, down


def test_a_made_up_family_scores_as_its_formula_says(tmp_path: Path, made_up: tuple) -> None:
    folder, model, up, down = made_up
    bundle = export(folder, tmp_path / "bundle", spec_file=folder.parent / "my_rm.toml")
    assert bundle.manifest.spec.family == "my_rm"
    answers = [text for text in make_texts(26, longest=20) if text]
    assert len(answers) >= 24
    expected = []
    for answer in answers:
        ids = make_tokenizer()(f"Q: why?\nA: {answer}</s>", add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            state = model(torch.tensor([ids])).last_hidden_state[0, -4:].mean(0)
            values = down @ torch.tanh(up @ state) - torch.tensor([0.5, -1.25, 2.0])
        expected.append((values @ torch.tensor([1.0, 0.5, -0.25])).item())
    rows = [{"prompt": "why?", "response": answer} for answer in answers]
    std = np.std(expected)
    for padding in (False, True):
        found = RewardModel.load(tmp_path / "bundle", provider="cpu", padding=padding).score_many(rows)
        assert np.abs(found - expected).max() < 1e-4 * std


def test_a_model_of_no_family_is_refused_with_the_closest_one_and_what_does_not_fit(made_up: tuple) -> None:
    folder, *_ = made_up
    result = run("export", folder, "--explain")
    assert result.returncode == 2
    assert "LlamaForJudging is not a reward model of a known family" in result.stderr
    assert "the closest family is " in result.stderr
    assert "judge.down, judge.up" in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heads = []", "heads: expected at least one"),
        ('[[heads]]\nlayers = [{ weight = "x", size = 3 }]', "my.toml.heads[0].layers[0]: unknown field 'size'"),
        ('[[heads]]\nlayers = [{ weight = "x" }]\ntaps = ["head"]', "a head reads ['head']"),
        (
            '[[heads]]\nlayers = [{ weight = "nothere" }]',
            "spec needs nothere ['outputs', 32], and the checkpoint has not",
        ),
        ("taps = [", "my.toml: not readable as TOML"),
        ('pooling = "last"', "my.toml: unknown field 'pooling', no field 'heads'"),
    ],
)
def test_a_spec_file_that_is_wrong_is_refused_by_its_place(
    tmp_path: Path, made_up: tuple, text: str, message: str
) -> None:
    (tmp_path / "my.toml").write_text(text)
    with pytest.raises(RewardRTError) as caught:
        export(made_up[0], tmp_path / "bundle", spec_file=tmp_path / "my.toml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_explain_prints_is_the_spec_that_export_would_use(tmp_path: Path) -> None:
    write_openrlhf(tmp_path / "rm", config={"mean": 0.5, "std": 2.0})
    source = read_source(tmp_path / "rm")
    draft = FAMILIES["openrlhf"].describe(source)
    printed = run("export", tmp_path / "rm", "--explain").stdout
    assert printed == f"# rm: OpenRLHF reward model\n{to_toml(draft)}"
    read = from_json(Draft, tomllib.loads(printed), complete=False)
    assert (read.heads, read.text, read.taps, read.normalise) == (draft.heads, draft.text, draft.taps, draft.normalise)
    assert (
        "# RewardModel.forward reads the last position whose attention mask is 1\n"
        '[[taps]]\nname = "last"\nrule = "last_mask"\n'
    ) in printed


def test_every_draft_that_explain_prints_is_a_spec_file_of_the_same_draft() -> None:
    drafts = [
        Draft(heads=HEADS, reasons={"text": "why", "taps": "why", "unused": "why"}),
        Draft(heads=HEADS, input="pairwise", causal=False, max_length=512, backbone_prefix="x.", unused={"a.b": "why"}),
        Draft(
            heads=HEADS, text=TextRule(overwrite_last=2), taps=(Tap("a", "last_id", (7,)),), normalise=Affine(1.0, 2.0)
        ),
    ]
    for draft in drafts:
        read = from_json(Draft, tomllib.loads(to_toml(draft)), complete=False)
        assert read == dataclasses.replace(draft, reasons={})
