"""The command: what it prints, where, and its exit status."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import rewardrt
from commands import run
from rewardrt import RewardModel

ROWS = [
    {"id": 1, "prompt": "Name a colour.", "response": "Blue."},
    {"id": 2, "prompt": "Name a colour.", "responses": ["Blue.", "No.", "Seven"]},
    {"id": 3, "prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Seven"},
    {"id": 4, "text": "Name a colour. Blue."},
    {"id": 5, "messages": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]},
    {"id": 6, "prompt": [{"role": "user", "content": "Name a colour."}], "response": "Blue."},
]


def jsonl(rows: list[dict[str, object]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def test_rows_of_every_shape_come_out_in_order_with_their_fields_kept(tmp_path: Path, tiny_bundle: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(jsonl(ROWS))
    result = run("score", tiny_bundle, tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--provider", "cpu")
    assert (result.returncode, result.stdout) == (0, "")
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in out] == [1, 2, 3, 4, 5, 6]
    assert all(row | before == row for row, before in zip(out, ROWS, strict=True))  # every field kept
    model = RewardModel.load(tiny_bundle, provider="cpu")
    blue, no, seven = (np.float32(model.score(prompt="Name a colour.", response=r)) for r in ("Blue.", "No.", "Seven"))
    assert np.float32(out[0]["reward"]) == blue
    assert [np.float32(reward) for reward in out[1]["rewards"]] == [blue, no, seven]
    assert out[1]["best"] == int(np.argmax([blue, no, seven]))
    assert (np.float32(out[2]["chosen_reward"]), np.float32(out[2]["rejected_reward"])) == (blue, seven)
    assert np.float32(out[2]["margin"]) == blue - seven
    assert np.float32(out[4]["reward"]) == np.float32(out[5]["reward"]) == blue
    assert [type(row["tokens"]) for row in out] == [int, list, list, int, int, int]
    assert (out[1]["truncated"], out[3]["truncated"]) == ([0, 0, 0], 0)
    right = int(blue > seven)
    assert result.stderr.splitlines()[0] == f"{tiny_bundle}: fp32 on cpu"
    assert result.stderr.splitlines()[1].startswith("scored 6 of 6 rows: 9 texts, ")
    assert result.stderr.splitlines()[2:] == [f"accuracy {right:.4f}: chosen above rejected in {right} of 1 pairs"]


def test_standard_input_and_output_are_the_default_of_a_pipe(tiny_bundle: Path) -> None:
    result = run("score", tiny_bundle, "-", "--json", stdin=jsonl(ROWS[:1]))
    assert result.returncode == 0
    assert json.loads(result.stdout)["id"] == 1


WRONG_LINES = [
    (b"not json", "line 2: not JSON (Expecting value at character 1); expected a JSON object"),
    (b"[1]", "line 2: expected a JSON object, found list"),
    (b'{"prompt": 5, "response": "x"}', "prompt: expected a string or a list of messages, found int"),
    (b'{"prompt": "x", "response": ["y"]}', "response: expected a string, found list"),
    (b'{"prompt": "x", "responses": []}', "responses: expected a list of at least one string, found an empty list"),
    (b'{"messages": [{"role": "robot", "content": "x"}, {"role": "assistant", "content": "y"}]}', "the chat template"),
    (b'{"text": ""}', "text: expected at least one character, found an empty string"),
    (b'{"text": "\\ud800"}', "text: expected text that can be encoded as UTF-8, found the lone surrogate U+D800"),
    (b"", "line 2: blank line; expected a JSON object"),
    (b"\xff\xfe", "line 2: expected UTF-8, found the byte 0xff at byte 1"),
    (b'{"prompt": "no answer"}', "expected text, or messages ending with the assistant, or one of prompt"),
]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_every_wrong_row_comes_out_with_its_error_and_the_others_are_scored(tiny_bundle: Path, newline: bytes) -> None:
    for wrong, _ in WRONG_LINES:
        assert newline not in wrong
    good = b'{"text": "good"}'
    lines = b"\xef\xbb\xbf" + newline.join([good, newline.join(wrong for wrong, _ in WRONG_LINES), good])
    result = run("score", tiny_bundle, "-", stdin=lines)  # a BOM at the start, no newline at the end
    assert result.returncode == 1
    out = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(out) == len(WRONG_LINES) + 2
    assert out[0]["reward"] == out[-1]["reward"]
    for number, (row, (_, message)) in enumerate(zip(out[1:-1], WRONG_LINES, strict=True), 2):
        assert row["error"].startswith(message.replace("line 2", f"line {number}"))
        assert "reward" not in row
    assert result.stderr.splitlines()[-1] == "11 of 13 rows could not be scored; they have `error`"
    assert "Traceback" not in result.stderr


def test_a_text_of_a_megabyte_is_cut_and_says_so(tiny_bundle: Path) -> None:
    result = run("score", tiny_bundle, "-", stdin=jsonl([{"text": "many words here " * 65_536}]))
    assert result.returncode == 0
    row = json.loads(result.stdout)
    assert row["tokens"] == 2048
    assert row["truncated"] > 100_000
    assert "1 of 1 texts were cut at 2048 tokens; `truncated` says by how much" in result.stderr


def test_one_prompt_prints_a_number_and_several_answers_a_ranking(tiny_bundle: Path) -> None:
    model = RewardModel.load(tiny_bundle, provider="cpu")
    result = run("score", tiny_bundle, "--prompt", "Name a colour.", "--response", "Blue.")
    assert result.stdout == f"{model.score(prompt='Name a colour.', response='Blue.'):.4f}\n"
    ranked = model.rank(prompt="Name a colour.", responses=["Blue.", "No.", "Seven"])
    many = [part for answer in ("Blue.", "No.", "Seven") for part in ("--response", answer)]
    result = run("score", tiny_bundle, "--prompt", "Name a colour.", *many)
    lines = [f"{i:4d}  {r.reward:9.4f}  {r.tokens:6d}  {r.response}" for i, r in enumerate(ranked, 1)]
    assert result.stdout.splitlines() == ["rank     reward  tokens  answer", *lines]
    assert [r.reward for r in ranked] == sorted((r.reward for r in ranked), reverse=True)


def test_normalized_rewards_are_the_raw_ones_shifted_and_scaled(tiny_bundle: Path) -> None:
    spec = RewardModel.load(tiny_bundle, provider="cpu").spec
    assert spec.normalise is not None
    stdin = jsonl([{"text": "a text"}])
    rewards = {
        flag: json.loads(run("score", tiny_bundle, "-", *flag, stdin=stdin).stdout)["reward"]
        for flag in ((), ("--raw",), ("--normalize",))
    }
    assert rewards[()] == rewards[("--raw",)]
    expected = (rewards[("--raw",)] - spec.normalise.mean) / spec.normalise.std
    assert rewards[("--normalize",)] == pytest.approx(expected, rel=1e-6)


def test_inspect_shows_the_spec_and_the_certificate(tiny_bundle: Path) -> None:
    result = run("inspect", tiny_bundle)
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"{tiny_bundle}: openrlhf, llama, 1,771,392 parameters"
    assert lines[2] == (
        "  text       chat template -> strip '\\n' at the end -> append ' </s>' if missing -> no special tokens added "
        "-> cut to 2048 tokens -> last id becomes 2"
    )
    assert lines[5].startswith("  certified  fp32: within ")
    manifest = json.loads(run("inspect", tiny_bundle, "--json").stdout)
    assert manifest["format_version"] == 2
    assert manifest["spec"]["taps"] == [
        {"name": "last", "rule": "last_mask", "ids": [], "count": 0, "offset": 0, "skip": 0}
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either input files (or - for standard input) or --prompt with --response"),
        (("--prompt", "a"), "--prompt needs at least one --response"),
        (("in.jsonl", "--response", "a"), "--response goes with --prompt"),
        (("-", "--table", "--json"), "--table prints a file's rows for people"),
        (("-", "--threads", "0"), "0 is not in the range x>=1"),
        (("-", "--provider", "tpu"), "'tpu' is not one of 'auto', 'cpu', 'cuda', 'tensorrt'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tiny_bundle: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run("score", tiny_bundle, *arguments)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())


def test_a_missing_input_and_an_unwritable_output_are_refused(tmp_path: Path, tiny_bundle: Path) -> None:
    result = run("score", tiny_bundle, tmp_path / "none.jsonl")
    assert result.returncode == 2
    assert f"error: {tmp_path / 'none.jsonl'}: cannot be read (No such file or directory)" in result.stderr
    result = run("score", tiny_bundle, "-", "-o", tmp_path / "none" / "out.jsonl", stdin=jsonl(ROWS))
    assert result.returncode == 2
    assert "cannot be written (No such file or directory)" in result.stderr


def test_the_version_is_the_distributions(tiny_bundle: Path) -> None:
    assert run("--version").stdout == f"rewardrt {rewardrt.__version__}\n"


def test_every_command_has_help_and_is_in_the_readme() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    listed = run("--help").stdout
    for command in ("doctor", "export", "inspect", "score", "verify"):
        assert f"  {command} " in listed
        assert run(command, "--help").returncode == 0
        assert f"rewardrt {command}" in readme
