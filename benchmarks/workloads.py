"""What the benchmark scores: rows out of files, the same ones at every run.

Speed is measured over the first rows of each file. Agreement is measured over the last ones too, which nothing else
here reads.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
Count = Callable[[str], int]  # tokens of a string

PROMPT_TOKENS = (560, 680)  # of a best-of-16 row's prompt
ANSWERS = 16
ANSWER_TOKENS = (110, 190)  # of each of its answers


@dataclass(frozen=True)
class Sizes:
    """How many rows of each kind; None is all of a file."""

    harmless: int | None
    en: int | None
    best_of_4: int | None
    best_of_16: int
    held_out_harmless: int
    held_out_en: int


DEFAULT = Sizes(16, 8, 6, 1, 64, 16)
QUICK = Sizes(8, 4, 2, 1, 8, 2)
FULL = Sizes(None, None, None, 8, 64, 16)


def read_rows(file: Path) -> Rows:
    """Read every row of a JSONL file."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_workloads(data: Path, folder: Path, sizes: Sizes, count: Count) -> dict[str, Path]:
    """Write a file for each workload, and `held out`; by name."""
    harmless, en = read_rows(data / "pairs_harmless.jsonl"), read_rows(data / "pairs_en.jsonl")
    four = read_rows(data / "best_of_4.jsonl")
    rows = {
        "harmless": harmless[: sizes.harmless],
        "en": en[: sizes.en],
        "best of 4": four[: sizes.best_of_4],
        "best of 16": list(itertools.islice(best_of_16(en, harmless, count), sizes.best_of_16)),
        "held out": harmless[-sizes.held_out_harmless :] + en[-sizes.held_out_en :],
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, given in rows.items():
        files[name] = folder / f"{name.replace(' ', '_')}.jsonl"
        files[name].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given), encoding="utf-8")
    return files


def best_of_16(prompts: Rows, answers: Rows, count: Count) -> Iterator[dict[str, Any]]:
    """Yield rows of a prompt that is several prompts of a file on end, and of 16 answers out of another file."""
    fitting = (answer for answer in _answers(answers) if ANSWER_TOKENS[0] <= count(answer) <= ANSWER_TOKENS[1])
    pieces = (" ".join(message["content"] for message in row["messages"]) for row in prompts)
    while True:
        prompt = ""
        while count(prompt) < PROMPT_TOKENS[0]:
            piece = next(pieces, None)
            if piece is None:
                return
            longer = f"{prompt}\n\n{piece}".strip()
            if count(longer) <= PROMPT_TOKENS[1]:
                prompt = longer
        responses = list(itertools.islice(fitting, ANSWERS))
        if len(responses) < ANSWERS:
            return
        yield {"prompt": prompt, "responses": responses}


def _answers(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        yield row["chosen"]
        yield row["rejected"]
