"""Load the tokenizer of a folder by transformers' class, and check it against the folder's own files."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from rewardrt.errors import CheckpointError
from rewardrt_export.source.chat_template import TOKENIZER_CONFIG
from rewardrt_export.source.text_files import read_json
from rewardrt_export.source.tokenizer import TokenizerChoice, TrainedTokenizer, settle
from rewardrt_export.source.tokenizer_files import (
    SETTINGS,
    check_tokenizer_files,
    check_vocabulary,
    differs_from_sentencepiece,
    find_tokenizer_files,
    read_limit,
)
from rewardrt_export.source.weights import first_line


def read_tokenizer(folder: Path, config: PretrainedConfig | None, choice: TokenizerChoice | None) -> TrainedTokenizer:
    """Read the tokenizer of a folder; `config` is passed to transformers if it was already read."""
    own_code = (folder / TOKENIZER_CONFIG).is_file() and "auto_map" in read_json(folder / TOKENIZER_CONFIG)
    if own_code and not (folder / "tokenizer.json").is_file():
        # transformers would guess a class for the other files, and so guess the ids.
        raise CheckpointError(
            f"{folder}: no tokenizer.json, and a tokenizer with code of its own, which is never run; make one with "
            "AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(folder)"
        )
    check_tokenizer_files(folder)
    for name in ("tokenization_utils_base", "configuration_utils"):
        logging.getLogger(f"transformers.{name}").setLevel(logging.ERROR)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False
        )
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # any error of the three libraries; a panic in tokenizers is a BaseException
        found = find_tokenizer_files(folder)
        read = ", ".join([*found, *(name for name in SETTINGS if (folder / name).is_file())])
        why = (
            "" if "tokenizer.json" in found else "; its class reads other files, or one is missing: add tokenizer.json"
        )
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be loaded from {read}{why} ({first_line(error)})"
        ) from error
    check_vocabulary(folder, tokenizer)
    if differs_from_sentencepiece(folder, tokenizer) is not None:
        tokenizer = _read_sentencepiece(folder, tokenizer)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise CheckpointError(f"{folder}: {type(tokenizer).__name__} has no fast version, which the runtime needs")
    tokenizer.model_max_length = read_limit(folder / TOKENIZER_CONFIG, tokenizer.model_max_length)
    return settle(tokenizer, folder, choice)


def _read_sentencepiece(folder: Path, tokenizer: Any) -> PreTrainedTokenizerBase:
    """Read tokenizer.model by Llama's class, if no file names a class and the one chosen by transformers is wrong."""
    said = differs_from_sentencepiece(folder, tokenizer)
    with contextlib.suppress(Exception):  # raised if the file has another layout
        found: PreTrainedTokenizerBase = LlamaTokenizer.from_pretrained(folder, local_files_only=True)
        if differs_from_sentencepiece(folder, found) is None:
            return found
    raise CheckpointError(
        f"{folder}: {type(tokenizer).__name__} gives other tokens than sentencepiece ({said}); name the "
        "tokenizer_class in tokenizer_config.json, or add tokenizer.json"
    )
