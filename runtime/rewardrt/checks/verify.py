"""Check that this machine gives the rewards that torch gave at export.

golden.jsonl contains texts, their token ids and torch's raw rewards, so torch is not needed here. Export certifies a
new bundle with the same function that `rewardrt verify` calls later.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rewardrt.bundle.certificate import Deviation
from rewardrt.bundle.manifest import GOLDEN
from rewardrt.bundle.precisions import PRECISIONS
from rewardrt.bundle.spec import from_json, to_json
from rewardrt.errors import BundleError, InferenceError, RewardRTError
from rewardrt.machine.providers import Provider
from rewardrt.reward_model import RewardModel
from rewardrt.scoring.answers import Values
from rewardrt.scoring.pairwise import text_of
from rewardrt.steps import Count, uncounted
from rewardrt.text.items import Item
from rewardrt.text.rows import parse_row
from rewardrt.text.tokens import EncodedText

PADDED_TOKENS = 4096  # tokens of a padded batch: enough for several texts, and little memory


@dataclass(frozen=True)
class GoldenText:
    """One line of golden.jsonl."""

    row: dict[str, Any]  # a row with one text; two responses are one text for models that read two answers together
    max_length: int | None  # this text's own limit in tokens, below the spec's; None: the spec's
    ids: tuple[int, ...]  # as scored, after the cut
    type_ids: tuple[int, ...] | None  # for models that read a pair of texts
    truncated: int
    positions: tuple[int, ...]  # indices into ids, as EncodedText has them
    rewards: tuple[float, ...]  # torch's raw rewards: one, one for each step, or the vector of a pairwise model

    @property
    def item(self) -> Item:
        """The one text of the row."""
        return text_of(parse_row(self.row))

    @property
    def encoded(self) -> EncodedText:
        """The text as it was tokenized at export."""
        ids, positions = np.array(self.ids, dtype=np.int64), np.array(self.positions, dtype=np.int64)
        type_ids = None if self.type_ids is None else np.array(self.type_ids, dtype=np.int64)
        return EncodedText(ids, self.truncated, positions, type_ids)


@dataclass(frozen=True)
class Verification:
    """The measurements of `verify`; `problems` is empty if the bundle is within the tolerance here."""

    precision: str
    provider: Provider
    texts: int
    reward_std: float  # population standard deviation of the reference rewards
    tolerance_std: float
    single: Deviation  # every text alone
    batched: Deviation  # all texts together, in right-padded batches
    pair_order_agreement: float  # share of pairs ranked the same way, of those that are not ties in the reference
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether there are no problems."""
        return not self.problems


def verify(model: RewardModel, *, count: Count = uncounted) -> Verification:
    """Score the bundle's golden texts on this machine, alone and in batches, and compare with torch's rewards.

    `count` is called for each text that is scored alone. Raises BundleError if the bundle is uncertified or
    golden.jsonl cannot be read; differences from torch are in the result.
    """
    if model.bundle.manifest.uncertified:
        raise BundleError(
            f"{model.bundle.name}: uncertified: exported with --no-certify, it has no rewards of torch to verify "
            "against; export the checkpoint again without it"
        )
    if model.precision not in PRECISIONS:
        raise BundleError(f"{model.bundle.name}: no tolerance is known for {model.precision}; upgrade rewardrt")
    texts = read_golden(model.bundle.file(GOLDEN))
    expected = np.array([reward for text in texts for reward in text.rewards], dtype=np.float64)
    std = float(expected.std())
    if not std > 0:
        raise BundleError(f"{model.bundle.name}: every golden text has the same reward; nothing can be verified")
    encoded = [text.encoded for text in texts]
    failures: list[str] = []
    alone = []
    for number, each in enumerate(encoded, 1):
        count(number, len(encoded))
        alone += model.runner.run([each])
    single = _rewards(alone, texts, failures)
    # Accelerators score padded batches. They are checked on a CPU too, although scoring does not pad there.
    batched = _rewards(model.runner.run(encoded, padding=True, batch_tokens=PADDED_TOKENS), texts, failures)
    tolerance = PRECISIONS[model.precision].tolerance_std
    deviations = [_deviation(values, expected, std) for values in (single, batched)]
    problems = [*failures[:1], *_text_problems(model, texts)]
    worst = max(deviation.max_std for deviation in deviations)
    if not failures and not worst <= tolerance:
        problems.append(
            f"a reward differs from torch's by {worst:.2g} standard deviations of the reward; "
            f"at most {tolerance:g} is allowed"
        )
    return Verification(
        precision=model.precision,
        provider=model.provider,
        texts=len(texts),
        reward_std=std,
        tolerance_std=tolerance,
        single=deviations[0],
        batched=deviations[1],
        pair_order_agreement=pair_order_agreement(single, expected),
        problems=tuple(problems),
    )


def _text_problems(model: RewardModel, texts: Sequence[GoldenText]) -> list[str]:
    """Name the texts that are tokenized differently here, unless the chat template prints the current date."""
    if model.answers.uses_date:
        return []
    other = []
    for number, text in enumerate(texts, 1):
        encoded = model.answers.encode([text.item], max_length=text.max_length)[0]
        if not isinstance(encoded, EncodedText) or (
            (tuple(encoded.ids.tolist()), tuple(encoded.positions.tolist())) != (text.ids, text.positions)
        ):
            other.append(str(number))
    return [f"other token ids than at export for golden texts {', '.join(other)}"] if other else []


def read_golden(path: Path) -> list[GoldenText]:
    """Read golden.jsonl strictly. Raises BundleError naming the line."""
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        where = f"{path}, line {number}"
        try:
            text = from_json(GoldenText, json.loads(line), where)
            if not text.ids or not text.rewards or not np.isfinite(text.rewards).all():
                raise BundleError(f"{where}: no ids, no rewards, or one that is not finite")
            if not text.positions or not 0 <= min(text.positions) <= max(text.positions) < len(text.ids):
                raise BundleError(f"{where}: positions {list(text.positions)} outside of {len(text.ids)} ids")
            parse_row(text.row)
        except ValueError as error:
            raise BundleError(f"{where}: not JSON ({error})") from error
        except RewardRTError as error:
            raise BundleError(str(error)) from error
        texts.append(text)
    if not texts:
        raise BundleError(f"{path}: no golden texts; nothing can be verified")
    return texts


def write_golden(path: Path, texts: Iterable[GoldenText]) -> None:
    """Write golden.jsonl."""
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps(to_json(text), ensure_ascii=False, allow_nan=False) + "\n")


def _rewards(
    results: Sequence[Values | InferenceError], texts: Sequence[GoldenText], failures: list[str]
) -> npt.NDArray[np.float64]:
    """Return the rewards of all texts as one array, as many per text as torch gave; NaN if the graph failed."""
    failures += [str(result) for result in results if isinstance(result, InferenceError)]
    rewards = []
    for result, text in zip(results, texts, strict=True):
        values = np.full(len(text.rewards), np.nan)
        if not isinstance(result, InferenceError):
            values[: len(result)] = result[: len(values)]
        rewards.append(values)
    return np.concatenate(rewards)


def _deviation(found: npt.NDArray[np.float64], expected: npt.NDArray[np.float64], std: float) -> Deviation:
    if np.isnan(found).any():
        return Deviation(float("inf"), float("inf"), float("inf"))
    difference = np.abs(found - expected)
    relative = difference / np.maximum(np.abs(expected), np.finfo(np.float32).tiny)
    return Deviation(float(difference.max()), float(relative.max()), float(difference.max() / std))


def pair_order_agreement(found: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> float:
    """Return the share of pairs ranked the same way, 0..1, of those whose expected rewards differ."""
    same = pairs = 0
    for index in range(len(expected)):
        wanted, got = np.sign(expected[index:] - expected[index]), np.sign(found[index:] - found[index])
        same += int(((got == wanted) & (wanted != 0)).sum())
        pairs += int((wanted != 0).sum())
    return same / pairs
