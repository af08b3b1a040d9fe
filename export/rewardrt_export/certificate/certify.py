"""The certificate: the exported bundle, scored by the public runtime, compared with the torch model (`reference`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from rewardrt import RewardModel
from rewardrt.bundle.certificate import Certificate, Fidelity
from rewardrt.bundle.manifest import GOLDEN
from rewardrt.bundle.precisions import PRECISIONS
from rewardrt.checks.verify import GoldenText, pair_order_agreement, read_golden, verify
from rewardrt.errors import CertificateError, InferenceError
from rewardrt.steps import Count, uncounted
from rewardrt.text.tokens import EncodedText
from rewardrt_export.certificate import memory
from rewardrt_export.certificate.encode import certified_lengths, encode_probes, encode_texts, uncertified_lengths
from rewardrt_export.certificate.golden import MIN_TEXTS
from rewardrt_export.certificate.published_class import rewards_of_class
from rewardrt_export.certificate.reference import score_with_torch, spread
from rewardrt_export.checkpoint import Checkpoint
from rewardrt_export.precisions.calibrate import Calibration

PROBES_BY_LAYER = 4  # number of probes for a model that is read from disk for every text


@dataclass(frozen=True)
class Split:
    """The indices of the texts that calibration sees, and of those that are left to measure on; no text is in both."""

    seen: range
    unseen: range

    @classmethod
    def of(cls, texts: int, *, calibrated: bool) -> Split:
        """Let calibration see every other text, starting with the first; without calibration, all texts are left."""
        return cls(range(0, texts, 2), range(1, texts, 2)) if calibrated else cls(range(0), range(texts))


@dataclass(frozen=True)
class GoldenSet:
    """The golden texts with torch's rewards: `own` for calibration and fidelity, and the probes."""

    own: tuple[GoldenText, ...] = ()
    probes: tuple[GoldenText, ...] = ()
    split: Split = Split.of(0, calibrated=False)  # which of `own` calibration sees

    @property
    def every(self) -> tuple[GoldenText, ...]:
        """All texts that the bundle is certified on, in the order of golden.jsonl."""
        return self.own + self.probes

    @property
    def unseen(self) -> tuple[GoldenText, ...]:
        """The texts among `own` that calibration did not see."""
        return tuple(self.own[index] for index in self.split.unseen)

    @property
    def reward_std(self) -> float:
        """The standard deviation of torch's rewards, without the probes."""
        return spread([text.rewards for text in self.own])


def score_golden(
    checkpoint: Checkpoint,
    bundle: Path,
    file: Path | None,
    calibration: Calibration | None = None,
    *,
    by_layer: bool = False,
    count: Count = uncounted,
) -> GoldenSet:
    """Tokenize golden texts and probes with the bundle's own files, and score them with torch.

    With `by_layer` they are MIN_TEXTS texts evenly chosen from the default set, and a few probes. Raises
    CertificateError if transformers' own template, tokenizer or class gives another result for one of them.
    """
    candidates, encoded = encode_texts(checkpoint, bundle, file)
    if by_layer and file is None:
        chosen = np.linspace(0, len(candidates) - 1, MIN_TEXTS).round().astype(int)
        candidates, encoded = [candidates[index] for index in chosen], [encoded[index] for index in chosen]
    own = len(candidates)
    split = Split.of(own, calibrated=calibration is not None)
    probes, encoded_probes = encode_probes(checkpoint, bundle, () if by_layer else certified_lengths(checkpoint))
    few = slice(None, PROBES_BY_LAYER if by_layer else None)
    candidates, encoded = candidates + probes[few], encoded + encoded_probes[few]
    rewards = score_with_torch(
        checkpoint, encoded, calibration=calibration, observed=split.seen, by_layer=by_layer, count=count
    )
    _compare_with_class(checkpoint, encoded, rewards)
    texts = [
        GoldenText(
            candidate.row,
            candidate.max_length,
            tuple(text.ids.tolist()),
            None if text.type_ids is None else tuple(text.type_ids.tolist()),
            text.truncated,
            tuple(text.positions.tolist()),
            found,
        )
        for candidate, text, found in zip(candidates, encoded, rewards, strict=True)
    ]
    return GoldenSet(tuple(texts[:own]), tuple(texts[own:]), split)


def _compare_with_class(
    checkpoint: Checkpoint, texts: Sequence[EncodedText], rewards: Sequence[tuple[float, ...]]
) -> None:
    """Raise CertificateError if transformers' own class gives other rewards than its backbone with our heads."""
    theirs = rewards_of_class(checkpoint, texts, memory.available_memory())
    allowed = PRECISIONS["fp32"].tolerance_std * max(spread(rewards), 1e-3)
    for index, expected in theirs.items():
        if abs(rewards[index][0] - expected) > allowed:
            raise CertificateError(
                f"{checkpoint.source.architecture} of transformers gives {expected:g} for a golden text, and the "
                f"family {checkpoint.spec.family!r} gives {rewards[index][0]:g}; name another --family or --pooling"
            )


def measure_fidelity(
    checkpoint: Checkpoint,
    bundle: Path,
    precision: str,
    golden: GoldenSet,
    *,
    by_layer: bool = False,
    count: Count = uncounted,
) -> Fidelity:
    """Compare a rounded graph, and torch in bfloat16, with torch in float32 on golden texts.

    For a calibrated precision, only texts that calibration did not see are used.
    """
    unseen = golden.unseen if PRECISIONS[precision].calibrated else golden.own
    texts = [text.encoded for text in unseen]
    model = RewardModel.load(bundle, provider="cpu", precision=precision, check_hashes=False)
    expected = np.array([reward for text in unseen for reward in text.rewards], dtype=np.float64)
    found = []
    for text, values in zip(unseen, model.runner.run(texts), strict=True):
        if isinstance(values, InferenceError):
            raise CertificateError(f"{precision}: {values}")
        found += values[: len(text.rewards)].tolist()  # drop the objectives, which torch's list does not have
    rounded = np.array(found)
    del model  # free its memory before torch's is loaded
    other = score_with_torch(checkpoint, texts, dtype=torch.bfloat16, by_layer=by_layer, count=count)
    bfloat16 = np.array([value for each in other for value in each])
    std = golden.reward_std
    return Fidelity(
        texts=len(texts),
        rms_std=float(np.sqrt(np.mean((rounded - expected) ** 2))) / std,
        pair_order_agreement=pair_order_agreement(rounded, expected),
        bf16_rms_std=float(np.sqrt(np.mean((bfloat16 - expected) ** 2))) / std,
        bf16_pair_order_agreement=pair_order_agreement(bfloat16, expected),
    )


def certify(
    checkpoint: Checkpoint,
    bundle: Path,
    precision: str,
    fidelity: Fidelity | None = None,
    *,
    by_layer: bool = False,
    count: Count = uncounted,
) -> Certificate:
    """Score the golden texts with one of the graphs by the public runtime, and compare with torch.

    Raises CertificateError if the difference exceeds the precision's tolerance or is not a number.
    """
    found = verify(RewardModel.load(bundle, provider="cpu", precision=precision, check_hashes=False), count=count)
    if failed := [problem for problem in found.problems if problem.startswith("the graph failed on")]:
        name = checkpoint.source.architecture
        raise CertificateError(
            f"{precision}: the graph of {name} does not run for texts of every length, as where a class goes over the "
            f"tokens in a loop of its own code; this backbone cannot be exported yet ({failed[0]})"
        )
    if found.problems:
        raise CertificateError(
            f"the exported bundle failed its certificate, so none was written: {precision}: {'; '.join(found.problems)}"
        )
    longest = max(len(text.ids) for text in read_golden(bundle / GOLDEN))
    return Certificate(
        precision=found.precision,
        reference=f"torch {torch.__version__}, transformers {transformers.__version__}, float32, eager attention"
        + (", layer by layer" if by_layer else ""),
        texts=found.texts,
        reward_std=found.reward_std,
        tolerance_std=found.tolerance_std,
        single=found.single,
        batched=found.batched,
        pair_order_agreement=found.pair_order_agreement,
        provider=found.provider,
        fidelity=fidelity,
        longest=longest,
        beyond=uncertified_lengths(checkpoint, longest),
    )
