"""The tokenizer of training: the checkpoint's saved tokenizer.json, or the one that transformers builds.

transformers 5 rebuilds the tokenizers of many classes from the vocabulary and merges in tokenizer.json. It drops the
saved normalizer and pre-tokenizer, so the model may get other token ids than in training. So the two are compared; if
they differ, the saved file is used, and a note says so.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import transformers
from tokenizers import Tokenizer as Backend

from rewardrt.errors import CheckpointError
from rewardrt_export.source.text_files import read_json

TokenizerChoice = Literal["file", "transformers"]
TOKENIZER_FILE = "tokenizer.json"

# Texts on which tokenizers may differ: spaces, Unicode forms, case, digits, scripts, control characters.
TELLING_TEXTS = (
    " leading",
    "trailing  ",
    "  two  spaces\tand a tab\n\n  lines\r\nend\n",
    "e\u0301 a\u030a n\u0303 \u1112\u1161\u11ab",  # NFD: letters and marks apart
    "é å ñ 한",
    "ＡＢＣ　１２３ ﬁ ½ ² ㌔",
    "UPPER Lower camelCase snake_case",
    "don't won't I'll they've we'd",
    "1234567890 3.14 1,000 007",
    "你好，世界。 こんにちは 안녕하세요",
    "привет מים مرحبا नमस्ते",
    "🎉👩‍💻 ☕️",
    "def f(x):\n    return x ** 2  # !=\n",
    "zero\u200bwidth no\u00a0break soft\u00adhyphen",
    "a",
)


@dataclass(frozen=True)
class TrainedTokenizer:
    """`tokenizer` is transformers' object, with `backend` inside it; a bundle saves `backend`.

    `reference(text, pair, add_special_tokens)` returns the ids against which the bundle's are certified; it uses none
    of the bundle's own files. `choice` says which tokenizer was taken if there was a choice, else "".
    """

    tokenizer: Any
    backend: Backend
    reference: Callable[[str, str | None, bool], list[int]]
    choice: str = ""


def settle(tokenizer: Any, folder: Path, wanted: TokenizerChoice | None = None) -> TrainedTokenizer:
    """Compare the tokenizer that transformers built with the folder's tokenizer.json, and choose one.

    If `wanted` is None, the file is taken if there is one. Raises CheckpointError if the file cannot be read, or if it
    is wanted and missing.
    """
    path = folder / TOKENIZER_FILE
    rebuilt = _by_transformers(tokenizer)
    if not path.is_file():
        if wanted == "file":
            raise CheckpointError(f"{folder}: --tokenizer file, and there is no {TOKENIZER_FILE}; leave the option out")
        return TrainedTokenizer(tokenizer, tokenizer.backend_tokenizer, rebuilt)
    saved = _read(path, tokenizer, folder)
    as_saved = _by_file(saved)
    found = next(_differences(as_saved, rebuilt, tokenizer), None)
    if found is None:
        return TrainedTokenizer(tokenizer, saved, rebuilt)
    text, ours, theirs = found
    version = f"transformers {transformers.__version__} rebuilds {type(tokenizer).__name__}"
    difference = f"{text!r} is {_short(ours)} in the file and {_short(theirs)} rebuilt"
    if wanted == "transformers":
        choice = f"as {version}, as asked for; {TOKENIZER_FILE} gives other ids ({difference})"
        return TrainedTokenizer(tokenizer, tokenizer.backend_tokenizer, rebuilt, choice)
    choice = f"{TOKENIZER_FILE} as it was saved; {version} with other ids ({difference})"
    if wanted is None:
        choice += "; --tokenizer transformers takes those"
    changed = copy.copy(tokenizer)
    changed._tokenizer = copy.deepcopy(saved)
    return TrainedTokenizer(changed, saved, _by_file(_read(path, tokenizer, folder)), choice)


def special_tokens(backend: Backend) -> list[str]:
    """Return the tokens that a text may contain literally and that are one id each, in the order of their ids."""
    return [token.content for _, token in sorted(backend.get_added_tokens_decoder().items())]


def _read(path: Path, tokenizer: Any, folder: Path) -> Backend:
    """Read tokenizer.json, and add the tokens that only tokenizer_config.json or added_tokens.json declare."""
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception for every unreadable file
        raise CheckpointError(f"{path}: not a tokenizer that tokenizers can read ({error}); save it again") from error
    backend.no_padding()
    backend.no_truncation()
    # This setting is not part of the file: the library does not save it.
    backend.encode_special_tokens = bool(tokenizer.split_special_tokens)
    declared = set(_declared_tokens(folder))
    added = sorted(tokenizer.added_tokens_decoder.items())
    missing = [token for _, token in added if token.content in declared and backend.token_to_id(token.content) is None]
    if missing:
        backend.add_tokens(missing)
    return backend


def _declared_tokens(folder: Path) -> Iterator[str]:
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    decoder = config.get("added_tokens_decoder")
    for token in [*config.values(), *(decoder.values() if isinstance(decoder, dict) else ())]:
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            yield content
    if (folder / "added_tokens.json").is_file():
        yield from read_json(folder / "added_tokens.json")


def _by_transformers(tokenizer: Any) -> Callable[[str, str | None, bool], list[int]]:
    def ids(text: str, pair: str | None, special: bool) -> list[int]:
        return list(tokenizer(text, pair, add_special_tokens=special)["input_ids"])

    return ids


def _by_file(backend: Backend) -> Callable[[str, str | None, bool], list[int]]:
    def ids(text: str, pair: str | None, special: bool) -> list[int]:
        return list(backend.encode(text, pair, add_special_tokens=special).ids)

    return ids


def _differences(
    ours: Callable[[str, str | None, bool], list[int]],
    theirs: Callable[[str, str | None, bool], list[int]],
    tokenizer: Any,
) -> Iterator[tuple[str, list[int], list[int]]]:
    """Yield the texts for which two tokenizers give different ids, with both."""
    literal = [
        text
        for token in special_tokens(tokenizer.backend_tokenizer)
        for text in (f"{token} stands first", f"in the{token}middle", f"after a space {token}")
    ]
    for text in (*TELLING_TEXTS, *literal, *_golden_strings()):
        for special in (False, True):
            found = ours(text, None, special), theirs(text, None, special)
            if found[0] != found[1]:
                yield text, *found
    found = ours(TELLING_TEXTS[0], TELLING_TEXTS[6], True), theirs(TELLING_TEXTS[0], TELLING_TEXTS[6], True)
    if found[0] != found[1]:
        yield f"{TELLING_TEXTS[0]} / {TELLING_TEXTS[6]}", *found


def _golden_strings() -> Iterator[str]:
    """Yield every string of the golden texts."""
    for line in resources.files("rewardrt_export").joinpath("golden.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield from (value for value in row.values() if isinstance(value, str))
        yield from (message["content"] for message in row.get("messages", ()))


def _short(ids: list[int]) -> str:
    return str(ids) if len(ids) <= 8 else f"{str(ids[:8])[:-1]}, ...]"
