"""The comparison of a bundle's graphs with torch, measured at export and stored in the manifest."""

from __future__ import annotations

from dataclasses import dataclass, field

from rewardrt.bundle.spec import OPTIONAL

GOOD_RMS_STD = 0.03  # an rms_std up to this is good; torch's own error in bfloat16 is about as large


@dataclass(frozen=True)
class Deviation:
    """The largest differences between the runtime's rewards and the reference's over the golden texts."""

    max_absolute: float
    max_relative: float
    max_std: float  # max_absolute over the standard deviation of the reference rewards


@dataclass(frozen=True)
class Fidelity:
    """How close a rounded graph is to torch in float32, on texts not used for calibration, compared with bfloat16.

    Each rms is the root mean square of the differences, in standard deviations of torch's float32 rewards. Each
    agreement is the share of all pairs of texts that are ranked the same way, 0..1.
    """

    texts: int
    rms_std: float
    pair_order_agreement: float
    bf16_rms_std: float  # of torch in bfloat16 against torch in float32
    bf16_pair_order_agreement: float

    @property
    def good(self) -> bool:
        """Whether the graph is close enough to torch that precision "auto" may use it in place of the float32 graph."""
        return self.rms_std <= max(GOOD_RMS_STD, self.bf16_rms_std)


@dataclass(frozen=True)
class Certificate:
    """What was compared at export, and the result. All rewards are raw, before normalisation."""

    precision: str
    reference: str
    texts: int
    reward_std: float  # population standard deviation of the reference rewards
    tolerance_std: float  # `max_std` above this fails
    single: Deviation  # every text alone
    batched: Deviation  # all texts together, right-padded batches
    pair_order_agreement: float  # share of all pairs of texts that runtime and reference rank the same way, 0..1
    provider: str
    fidelity: Fidelity | None = field(default=None, metadata={OPTIONAL: True})  # for precisions that round
    longest: int | None = field(default=None, metadata={OPTIONAL: True})  # tokens of the longest golden text
    # Length limits in config.json that no golden text exceeded, so that what lies beyond is untested, such as
    # "sliding_window 4096".
    beyond: tuple[str, ...] = field(default=(), metadata={OPTIONAL: True})
