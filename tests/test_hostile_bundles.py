"""Whatever stands in a bundle's manifest, tokenizer and template: it loads and scores, or is refused in one line."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commands import run
from rewardrt import RewardModel, RewardRTError
from rewardrt.bundle.manifest import read_bundle
from rewardrt.cli.inspect import describe_manifest
from rewardrt.errors import BundleError

BUNDLE = Path(__file__).parent / "bundles" / "version-1"
MANIFEST = json.loads((BUNDLE / "reward.json").read_text())
ROWS = [{"prompt": "a", "response": "b"}, {"text": "abc"}, {"prompt": "a", "responses": ["b", "c"]}]
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    10**30,
    1.5,
    1e300,
    "",
    "x",
    "\x1b[31m\n",
    "../x",
    [],
    [[]],
    [-1],
    [10**30],
    {},
    {"a": 1},
]
ESC = "\x1b"


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the way to every value of a manifest; of lists that hold several things of a kind, to the first alone."""
    if path and not (path[0] in ("files", "certificates", "variants") and len(path) > 1 and path[1] != 0):
        yield path
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    else:
        inner = value.items() if isinstance(value, dict) and not path else ()
    for name, part in inner:
        yield from places(part, (*path, name))


PLACES = list(places(MANIFEST))


def scored(folder: Path) -> None:
    """Load and score as far as it goes; what is refused is refused in one line."""
    manifest = read_bundle(folder, check_hashes=False).manifest
    assert ESC not in describe_manifest("bundle", manifest)
    model = RewardModel.load(folder, provider="cpu", precision="fp32", check_hashes=False)
    for result in model.score_rows(ROWS):
        assert "\n" not in str(result)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("hostile") / "bundle"
    shutil.copytree(BUNDLE, target)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("part", sorted(MANIFEST))
def test_every_value_of_a_manifest_may_be_anything(folder: Path, part: str) -> None:
    refused = 0
    for path in PLACES:
        for value in VALUES if path[0] == part else ():
            manifest = copy.deepcopy(MANIFEST)
            place: Any = manifest
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = value
            (folder / "reward.json").write_text(json.dumps(manifest))
            try:
                scored(folder)
            except RewardRTError as error:
                refused += 1
                assert not {"\n", ESC} & set(str(error)), path  # noqa: PT017
            except BaseException as error:
                raise AssertionError(f"{path}: {value!r}") from error
    assert refused > 5


def test_the_places_are_all_kinds_of_values_of_a_manifest() -> None:
    assert len(PLACES) > 120
    assert {type(path[-1]) for path in PLACES} == {str, int}


def damaged_tokenizer(change: Callable[[dict[str, Any]], object]) -> bytes:
    data = json.loads((BUNDLE / "tokenizer.json").read_text())
    change(data)
    return json.dumps(data).encode()


TOKENIZERS: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "an empty object": b"{}",
    "not UTF-8": b"\xff\xfe",
    "no model": damaged_tokenizer(lambda data: data.pop("model")),
    "a model of another type": damaged_tokenizer(lambda data: data["model"].update(type="WordLevel")),
    "a model of no type": damaged_tokenizer(lambda data: data["model"].update(type="Nothing")),
    "a vocabulary that is a list": damaged_tokenizer(lambda data: data["model"].update(vocab=[1, 2])),
    "negative ids": damaged_tokenizer(lambda data: data["model"].update(vocab={"a": -1})),
    "ids of 64 bits": damaged_tokenizer(lambda data: data["model"].update(vocab={"a": 2**63})),
    "ids far apart": damaged_tokenizer(lambda data: data["model"].update(vocab={"a": 0, "b": 2**31}, merges=[])),
    "no vocabulary": damaged_tokenizer(lambda data: data["model"].update(vocab={}, merges=[])),
    "merges of what is not there": damaged_tokenizer(lambda data: data["model"].update(merges=["qq ww"])),
    "merges of one part": damaged_tokenizer(lambda data: data["model"].update(merges=["q"])),
    "an unknown normalizer": damaged_tokenizer(lambda data: data.update(normalizer={"type": "Nothing"})),
    "a pattern that is none": damaged_tokenizer(
        lambda data: data.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False})
    ),
    "a template of a token that is not there": damaged_tokenizer(
        lambda data: data.update(
            post_processor={"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<q>", "type_id": 0}}], "pair": [], "special_tokens": {}}
        )
    ),
    "added tokens without ids": damaged_tokenizer(lambda data: data.update(added_tokens=[{"content": "x"}])),
    "an added token that is empty": damaged_tokenizer(
        lambda data: data["added_tokens"].append(
            {"id": 5, "content": "", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        )
    ),
    "nested too deeply": b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
    "padding without an end": damaged_tokenizer(
        lambda data: data.update(
            padding={"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_damaged_tokenizer_loads_or_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    shutil.copytree(BUNDLE, tmp_path / "bundle")
    vouch(tmp_path / "bundle", "tokenizer.json", TOKENIZERS[name])
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    done = run("score", tmp_path / "bundle", tmp_path / "in.jsonl", "--precision", "fp32")
    assert done.returncode in (0, 1, 2)
    assert "Traceback" not in done.stderr
    if done.returncode == 2:
        *panic, said = done.stderr.splitlines()  # tokenizers prints where it panicked, before it raises that
        assert said.startswith(f"error: {tmp_path / 'bundle' / 'tokenizer.json'}: not a tokenizer that")
        assert not panic or "panicked" in done.stderr
    else:
        assert len(done.stdout.splitlines()) == len(ROWS)


def vouch(folder: Path, name: str, data: bytes) -> None:
    """Write a file of the bundle, and have the manifest say that it is the one."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "reward.json").read_text())
    for record in manifest["files"]:
        if record["path"] == name:
            record |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "reward.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("template", "refused"),
    [
        (b"\xed\xa0\x80", "chat_template.jinja: expected UTF-8"),
        (b"{{ '\\ud800' }}", ""),
        (b"{%", "the chat template is not valid Jinja"),
    ],
)
def test_a_template_that_no_text_can_be_made_of_is_named(tmp_path: Path, template: bytes, refused: str) -> None:
    shutil.copytree(BUNDLE, tmp_path / "bundle")
    vouch(tmp_path / "bundle", "chat_template.jinja", template)
    done = run("score", tmp_path / "bundle", "-", "--precision", "fp32", stdin=json.dumps(ROWS[0]).encode())
    if refused:
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert refused in done.stderr
    else:  # the bundle is sound, and the row has the error
        assert done.returncode == 1
        assert list(json.loads(done.stdout)) == ["prompt", "response", "error"]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150)
@given(path=st.sampled_from([path for path in PLACES if path[0] != "variants"]), value=JSON)
def test_any_json_in_any_place_of_a_manifest(folder: Path, path: tuple[str | int, ...], value: Any) -> None:
    manifest = copy.deepcopy(MANIFEST)
    place: Any = manifest
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    (folder / "reward.json").write_text(json.dumps(manifest))
    with suppress(RewardRTError):
        describe_manifest("bundle", read_bundle(folder, check_hashes=False).manifest)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=60))
def test_any_bytes_as_a_manifest_are_refused(folder: Path, data: bytes) -> None:
    (folder / "reward.json").write_bytes(data)
    with pytest.raises(BundleError) as caught:
        read_bundle(folder, check_hashes=False)
    assert "\n" not in str(caught.value)
