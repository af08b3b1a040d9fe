"""The texts of a file to measure with, and how close the rewards of two graphs are on them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rewardrt.bundle.spec import Spec
from rewardrt.checks.workers import Outputs, Worker, text_from_json
from rewardrt.data.readers import read_rows_of
from rewardrt.errors import RewardRTError, RowError
from rewardrt.scoring.answers import regroup
from rewardrt.scoring.pairwise import plan
from rewardrt.scoring.scored import Scored
from rewardrt.text.rows import Row, parse_row
from rewardrt.text.tokens import EncodedText


@dataclass(frozen=True)
class Workload:
    """Rows of a file, and the texts that are scored for them, in order; all candidates score the same texts."""

    name: str
    rows: tuple[Row, ...]
    texts: tuple[EncodedText, ...]

    @property
    def tokens(self) -> int:
        """The number of tokens of all texts, each counted in full."""
        return sum(len(text.ids) for text in self.texts)

    def answers(self, outputs: Outputs) -> list[list[float]]:
        """Return the rewards of each row's answers."""
        scores = (
            Scored(values[0], len(text.ids), 0, tuple(values[1:]))
            for text, values in zip(self.texts, outputs, strict=True)
        )
        rows = regroup(self.rows, scores)
        return [[answer.reward for answer in row.answers] for row in rows if not isinstance(row, RewardRTError)]


def read_workload(worker: Worker, spec: Spec, file: Path, *, rows: int | None, max_length: int | None) -> Workload:
    """Read the first `rows` rows of a file and let a worker encode their texts; rows with an error are left out.

    Raises RowError if no row can be scored.
    """
    found: list[dict[str, Any]] = []
    parsed: list[Row] = []
    for line in itertools.islice(read_rows_of(file), rows):
        if isinstance(line.row, RowError):
            continue
        try:
            parsed.append(plan(parse_row(line.row), spec))
        except RowError:
            continue
        found.append(line.row)
    if not found:
        raise RowError(f"{file}: no row that this model can score; see `rewardrt score` for what is wrong with each")
    texts = worker.ask({"rows": found, "max_length": max_length})["texts"]
    return Workload(file.name, tuple(parsed), tuple(text_from_json(text) for text in texts))


@dataclass(frozen=True)
class Fidelity:
    """How close rewards are to those of the reference."""

    rms_std: float  # root mean square of the differences, in standard deviations of the reference's rewards
    preferences: int  # pairs of answers to one prompt that have different rewards in the reference
    agreement: float | None  # share of these pairs that are ordered the same way, 0..1; None if there are none


def compare(workload: Workload, outputs: Outputs, reference: Outputs) -> Fidelity:
    """Compare outputs with the reference's: the reward of each text, and the order of each row's answers."""
    found = np.array([value for values in outputs for value in values], dtype=np.float64)
    expected = np.array([value for values in reference for value in values], dtype=np.float64)
    std = float(expected.std())
    rms = float(np.sqrt(np.mean((found - expected) ** 2)))
    same = [
        np.sign(ours[second] - ours[first]) == np.sign(theirs[second] - theirs[first])
        for ours, theirs in zip(workload.answers(outputs), workload.answers(reference), strict=True)
        for first, second in itertools.combinations(range(len(theirs)), 2)
        if theirs[first] != theirs[second]
    ]
    return Fidelity(rms / std if std else float(rms > 0), len(same), float(np.mean(same)) if same else None)


def texts_of_length(workload: Workload, spec: Spec, tokens: int) -> Iterator[EncodedText]:
    """Yield texts of exactly `tokens` tokens, cut from a workload's at different offsets and read at the last token."""
    ids = np.concatenate([text.ids for text in workload.texts])
    positions = np.full(max(len(spec.taps), 1), tokens - 1, dtype=np.int64)
    type_ids = np.zeros(tokens, dtype=np.int64) if spec.text.type_ids else None
    for start in itertools.count(step=37):
        yield EncodedText(np.take(ids, np.arange(start, start + tokens), mode="wrap"), 0, positions, type_ids)
