"""The tokenizer files of a checkpoint folder: which exist, and what keeps transformers from reading them.

transformers makes a tokenizer from whatever it finds, and an empty one if it finds nothing that its class reads. The
errors here name the file that cannot be read.
"""

from __future__ import annotations

import importlib.util
import math
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rewardrt.errors import CheckpointError, MissingExtraError
from rewardrt_export.source.text_files import check_pointer, read_json
from rewardrt_export.source.tokenizer import TOKENIZER_FILE
from rewardrt_export.source.weights import first_line

# File names from transformers' classes (`vocab_files_names`), and of other formats that it converts.
VOCABULARIES = (
    TOKENIZER_FILE, "*.model", "*.model.v[0-9]*", "*.spm", "*.tiktoken", "tekken.json", "vocab*.json", "vocab*.txt",
    "*_vocab.json", "*_vocab.txt", "merges.txt", "bpe.codes", "dict.txt", "*.tokenizer",
)  # fmt: skip
# Read together with a vocabulary; never enough alone.
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
CONVERTED = ("tekken.json", "tokenizer.model", "tiktoken.model")  # files that any class reads instead of its own
SENTENCEPIECE_PROBES = ("the quick brown fox jumps over the lazy dog", "of 19 words, \u2603 is none!")
NO_LIMIT = 10**30  # transformers' value for "no limit"
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/=]+ \d+\r?\n")


def find_tokenizer_files(folder: Path) -> list[str]:
    """Return the names of the files that contain a vocabulary."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in VOCABULARIES)]


def check_tokenizer_files(folder: Path) -> None:
    """Check the files before transformers reads them. Raises CheckpointError naming a damaged file."""
    found = find_tokenizer_files(folder)
    if not found:
        raise CheckpointError(
            f"{folder}: no tokenizer; expected {TOKENIZER_FILE} (or tokenizer.model, spiece.model, vocab.json and "
            "merges.txt, vocab.txt); copy the tokenizer's files beside the model"
        )
    for name in (*found, *SETTINGS):
        if (folder / name).is_file():
            check_pointer(folder / name)
            if name.endswith(".json"):
                read_json(folder / name)
    if TOKENIZER_FILE in found:
        return
    for name in found:
        if name.endswith(".tiktoken"):
            raise CheckpointError(
                f"{folder / name}: a vocabulary that only the checkpoint's own code reads, which is never run; make "
                f"{TOKENIZER_FILE} of it with transformers' convert_slow_tokenizer, or take that of the base model"
            )
        if name.endswith(".model") and name != "tiktoken.model":
            _check_sentencepiece(folder / name)


def check_vocabulary(folder: Path, tokenizer: Any) -> None:
    """Check that the class chosen by transformers reads the files that exist, or raise CheckpointError."""
    found = find_tokenizer_files(folder)
    if TOKENIZER_FILE in found or any(name in found for name in CONVERTED):
        return
    kind = type(tokenizer)
    wanted = {part: name for part, name in kind.vocab_files_names.items() if part in ("vocab_file", "merges_file")}
    missing = [name for name in wanted.values() if name not in found]
    if missing or not wanted:
        raise CheckpointError(
            f"{folder}: {kind.__name__}, which config.json or tokenizer_config.json names, reads "
            f"{' and '.join(wanted.values()) or TOKENIZER_FILE}, and the folder has {', '.join(found)}; add what is "
            f"missing, or {TOKENIZER_FILE}"
        )


def differs_from_sentencepiece(folder: Path, tokenizer: Any) -> str | None:
    """Say where a tokenizer converted from a sentencepiece file differs from sentencepiece itself; None if nowhere.

    transformers rebuilds such a tokenizer from parts, and without a class of its own it omits the mark before a word.
    """
    found = find_tokenizer_files(folder)
    models = [name for name in found if name.endswith(".model") and name != "tiktoken.model"]
    if TOKENIZER_FILE in found or len(models) != 1:
        return None
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(folder / models[0]))
    unknown = processor.unk_id()
    for probe in SENTENCEPIECE_PROBES:
        ids, theirs, ours = processor.encode(probe), processor.encode(probe, out_type=str), tokenizer.tokenize(probe)
        # Converters may make different numbers of unknown tokens, but they must not drop unknown pieces.
        known = unknown not in ids
        if (known and ours != theirs) or (not known and tokenizer.unk_token_id not in tokenizer(probe)["input_ids"]):
            return f"{' '.join(ours)} where {models[0]} says {' '.join(theirs)}"
    return None


def _check_sentencepiece(path: Path) -> None:
    if importlib.util.find_spec("sentencepiece") is None:
        raise MissingExtraError(f"{path} needs sentencepiece to be read: pip install 'rewardrt[export,cpu]'")
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # sentencepiece raises RuntimeError, OSError and TypeError
        with path.open("rb") as file:
            is_tiktoken = _TIKTOKEN_LINE.match(file.readline(4096))
        if is_tiktoken:
            raise CheckpointError(
                f"{path}: a tiktoken vocabulary, which does not say how texts are split; take {TOKENIZER_FILE} of the "
                "base model's folder in transformers' layout"
            ) from error
        raise CheckpointError(f"{path}: not a sentencepiece model ({first_line(error)}); copy it again") from error


def read_limit(path: Path, stated: Any) -> int:
    """Return `model_max_length` as a number of tokens; NO_LIMIT if the tokenizer has none.

    Raises CheckpointError if the value is not a length.
    """
    try:
        number = float(stated) if not isinstance(stated, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if stated is None or number >= NO_LIMIT:
        return NO_LIMIT
    if not (number >= 1 and number.is_integer()):
        raise CheckpointError(f"{path}: model_max_length {stated!r}; expected a number of tokens, 1 or more")
    return int(number)
