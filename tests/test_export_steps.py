"""An export says where it is, part by part, and leaves nothing behind when it is interrupted, wherever that is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints import write_openrlhf
from rewardrt.steps import Step
from rewardrt_export import pipeline, workplace


def test_every_part_of_a_step_is_counted_from_the_first_to_the_last(tmp_path: Path) -> None:
    write_openrlhf(tmp_path / "rm")
    steps: list[Step] = []
    made = pipeline.export(tmp_path / "rm", tmp_path / "bundle", precisions=("fp32", "int8"), progress=steps.append)
    begun = [step.name for step in steps if not step.of and not step.note]
    assert begun == [
        "reading the checkpoint",
        f"tracing {made.manifest.provenance.architecture} ({made.manifest.spec.backbone})",
        "scoring the golden texts with torch",
        "writing the fp32 graph",
        "calibrating the int8 graph",
        "writing the int8 graph",
        "certifying the fp32 graph against torch",
        "measuring what the int8 graph rounds off",
        "certifying the int8 graph against torch",
    ]
    assert [step.name for step in steps if step.of and step.name not in begun] == []
    counted = {name: [step for step in steps if step.name == name and step.of] for name in begun}
    for name, parts in counted.items():
        assert [step.at for step in parts] == list(range(1, len(parts) + 1)), name
        assert {step.of for step in parts} <= {len(parts)}, name
    texts = {certificate.precision: certificate.texts for certificate in made.manifest.certificates}
    assert len(counted["scoring the golden texts with torch"]) == texts["fp32"]
    assert len(counted["certifying the int8 graph against torch"]) == texts["int8"]
    fidelity = made.manifest.certificates[1].fidelity
    assert fidelity is not None
    assert len(counted["measuring what the int8 graph rounds off"]) == fidelity.texts
    layers = 2
    assert len(counted["calibrating the int8 graph"]) == 4 * layers  # q k v; o; gate and up; down: an activation each
    assert len(counted["writing the fp32 graph"]) == 7 * layers + 1  # what is multiplied, and the embedding
    assert (
        str(counted["writing the fp32 graph"][0])
        == f"writing the fp32 graph: weight 1 of {len(counted['writing the fp32 graph'])}"
    )


def interrupts_at(name: str, at: int) -> Callable[[Step], None]:
    def progress(step: Step) -> None:
        if step.name.startswith(name) and step.at == at:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(
    ("name", "at"), [("tracing", 0), ("writing the fp32 graph", 0), ("writing the fp32 graph", 7)], ids=str
)
def test_an_export_that_is_interrupted_leaves_nothing_behind(name: str, at: int, tmp_path: Path) -> None:
    write_openrlhf(tmp_path / "rm")
    target = tmp_path / "made" / "for" / "it" / "bundle"
    with pytest.raises(KeyboardInterrupt, match=r"^nothing was left behind$"):
        pipeline.export(tmp_path / "rm", target, certified=False, progress=interrupts_at(name, at))
    assert [path.name for path in tmp_path.iterdir()] == ["rm"]


def test_an_export_that_cannot_remove_what_it_wrote_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt  # a second one

    write_openrlhf(tmp_path / "rm")
    monkeypatch.setattr(workplace.shutil, "rmtree", again)
    with pytest.raises(KeyboardInterrupt) as caught:
        pipeline.export(tmp_path / "rm", tmp_path / "bundle", certified=False, progress=interrupts_at("tracing", 0))
    (left,) = set(tmp_path.iterdir()) - {tmp_path / "rm"}
    assert str(caught.value) == f"{left} was left behind: delete it"


def test_a_bundle_that_was_to_be_replaced_is_there_again_where_the_exchange_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_openrlhf(tmp_path / "rm")
    old = tmp_path / "bundle"
    pipeline.export(tmp_path / "rm", old, certified=False)
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    rename, calls = Path.rename, []

    def interrupted(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:  # the new one into its place
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"^nothing was left behind$"):
        pipeline.export(tmp_path / "rm", old, certified=False, force=True)
    assert len(calls) == 3
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "rm"]


def test_the_command_says_each_step_with_the_time_and_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from rewardrt.cli.app import main

    write_openrlhf(tmp_path / "rm")
    capfd.readouterr()
    target = tmp_path / "a bundle"
    monkeypatch.setattr("sys.argv", ["rewardrt", "export", str(tmp_path / "rm"), str(target), "--no-certify"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    out, err = capfd.readouterr()
    *steps, last = err.splitlines()
    assert [re.sub(r"^\[[\d.]+ s\] ", "", line).split(" ")[0] for line in steps] == [
        "loading",
        "reading",
        "tracing",
        "writing",
    ]
    assert all(re.match(r"\[[\d.]+ s\] ", line) for line in steps)
    assert re.fullmatch(
        r"exported in .*; next: `rewardrt score '(.*)' ROWS\.jsonl --table`, or `rewardrt serve '(.*)'`", last
    )
    assert f"'{target}'" in last
    assert out.startswith(f"{target}: openrlhf, llama, ")
    assert "next:" not in out
