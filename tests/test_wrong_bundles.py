"""A bundle that is not the one that was exported is refused in one line, and never scored."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands import run
from rewardrt import RewardModel, RewardRTError


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "reward.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x01
    path.write_bytes(data)


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte of the weights changed": (lambda f: flip_byte(f / "model.onnx.data"), "its SHA-256 is not the manifest's"),
    "a byte of the tokenizer changed": (lambda f: flip_byte(f / "tokenizer.json"), "its SHA-256 is not the manifest's"),
    "weights missing": ((lambda f: (f / "model.onnx.data").unlink()), "model.onnx.data: missing"),
    "template missing": ((lambda f: (f / "chat_template.jinja").unlink()), "chat_template.jinja: missing"),
    "weights cut short": (
        lambda f: (f / "model.onnx.data").write_bytes((f / "model.onnx.data").read_bytes()[:-1]),
        "7093247 bytes, the manifest says 7093248",
    ),
    "no manifest": ((lambda f: (f / "reward.json").unlink()), "reward.json: no such file"),
    "manifest not JSON": ((lambda f: (f / "reward.json").write_text("{")), "reward.json: not readable as JSON"),
    "manifest not UTF-8": ((lambda f: (f / "reward.json").write_bytes(b"\xff")), "reward.json: not readable as JSON"),
    "manifest a list": (
        (lambda f: (f / "reward.json").write_text("[]")),
        "format version None, this runtime reads 1 to 2",
    ),
    "newer format version": (
        lambda f: edit(f, lambda m: m.update(format_version=3)),
        "format version 3, this runtime reads up to 2; upgrade rewardrt: `pip install -U rewardrt`",
    ),
    "older format version": (
        lambda f: edit(f, lambda m: m.update(format_version=0)),
        "format version 0, this runtime reads 1 to 2; export the checkpoint again",
    ),
    "format version as text": (
        lambda f: edit(f, lambda m: m.update(format_version="1")),
        "format version '1', this runtime reads 1 to 2",
    ),
    "a path with ..": (
        lambda f: edit(f, lambda m: m["files"][0].update(path="../model.onnx")),
        "path '../model.onnx' leaves the bundle's folder",
    ),
    "an absolute path": (
        lambda f: edit(f, lambda m: m["files"][0].update(path="/etc/passwd")),
        "path '/etc/passwd' leaves the bundle's folder",
    ),
    "an unknown field": (
        lambda f: edit(f, lambda m: m["spec"].update(sigmoid=True)),
        "reward.json.spec: unknown field 'sigmoid'",
    ),
    "a missing field": (
        lambda f: edit(f, lambda m: m["spec"].pop("max_length")),
        "reward.json.spec: no field 'max_length'",
    ),
    "a field of another type": (
        lambda f: edit(f, lambda m: m["spec"].update(max_length="2048")),
        "reward.json.spec.max_length: expected int, found str",
    ),
    "an unknown pooling rule": (
        lambda f: edit(f, lambda m: m["spec"]["taps"][0].update(rule="median")),
        "reward.json.spec.taps[0].rule: 'median' is not one of 'last_mask', 'last_not_id', 'before_first_id'",
    ),
    "a pooling rule without its id": (
        lambda f: edit(f, lambda m: m["spec"]["taps"][0].update(rule="last_not_id")),
        "tap 'last': rule last_not_id with ids []; expected some",
    ),
    "a manifest that is a FIFO": (
        lambda f: replace(f / "reward.json", os.mkfifo),
        "reward.json: expected a file, found a FIFO",
    ),
    "a manifest without an end": (
        lambda f: replace(f / "reward.json", lambda path: path.symlink_to("/dev/zero")),
        "reward.json: expected a file, found a device",
    ),
    "a manifest that is a folder": (
        lambda f: replace(f / "reward.json", Path.mkdir),
        "reward.json: expected a file, found a folder",
    ),
    "a manifest that is a link to nothing": (
        lambda f: replace(f / "reward.json", lambda path: path.symlink_to("nothing")),
        "reward.json: cannot be read (No such file or directory)",
    ),
    "a manifest that is a link to itself": (
        lambda f: replace(f / "reward.json", lambda path: path.symlink_to("reward.json")),
        "reward.json: cannot be read (Too many levels of symbolic links)",
    ),
    "a manifest of a terabyte": (
        lambda f: os.truncate(f / "reward.json", 2**40),
        "reward.json: 1099511627776 bytes; expected at most 16777216: this is no manifest",
    ),
    "a manifest nested too deeply": (
        lambda f: (f / "reward.json").write_text("[" * 10**6),
        "reward.json: not readable as JSON (maximum recursion depth exceeded",
    ),
    "a tokenizer that is a FIFO": (
        lambda f: replace(f / "tokenizer.json", os.mkfifo),
        "tokenizer.json: expected a file, found a FIFO",
    ),
    "weights that are a device": (
        lambda f: replace(f / "model.onnx.data", lambda path: path.symlink_to("/dev/zero")),
        "model.onnx.data: expected a file, found a device",
    ),
    "golden texts that are a folder": (
        lambda f: replace(f / "golden.jsonl", Path.mkdir),
        "golden.jsonl: expected a file, found a folder",
    ),
    "a number that is none": (
        lambda f: edit(f, lambda m: m["certificates"][0].update(reward_std=float("nan"))),
        "reward.json: not readable as JSON (NaN is no number that JSON can carry)",
    ),
    "a number without bounds": (
        lambda f: (f / "reward.json").write_text((f / "reward.json").read_text().replace("0.0001", "1e999")),
        "reward.json: not readable as JSON (1e999 is no number that JSON can carry)",
    ),
    "a lone surrogate in a special token": (
        lambda f: edit(f, lambda m: m["spec"]["special_tokens"].update(bos_token="\ud800")),
        "reward.json: a string holds the lone surrogate U+D800",
    ),
    "no graph": (lambda f: edit(f, lambda m: m.update(variants=[])), "has no graph"),
    "the tokenizer not listed": (
        lambda f: edit(f, lambda m: m.update(files=[r for r in m["files"] if r["path"] != "tokenizer.json"])),
        "lists no tokenizer.json",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_bundle_is_refused_in_one_line(tmp_path: Path, tiny_bundle: Path, name: str) -> None:
    damage, message = WRONG[name]
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    damage(tmp_path / "bundle")
    with pytest.raises(RewardRTError) as caught:
        RewardModel.load(tmp_path / "bundle", provider="cpu")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("command", ["score", "verify", "inspect"])
def test_every_command_refuses_what_is_no_folder_with_exit_status_2(tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_text("x")
    advice = "nothing; `rewardrt export CHECKPOINT BUNDLE` makes one"
    for target, found in (("nothing", advice), ("file", "a file")):
        extra = ["--prompt", "a", "--response", "b"] if command == "score" else []
        result = run(command, tmp_path / target, *extra)
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr == f"error: {tmp_path / target}: expected a bundle folder, found {found}\n"


def test_scoring_a_tampered_bundle_exits_2_and_writes_nothing(tmp_path: Path, tiny_bundle: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    flip_byte(tmp_path / "bundle" / "model.onnx.data")
    (tmp_path / "in.jsonl").write_text('{"text": "hello"}\n')
    result = run("score", tmp_path / "bundle", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()
