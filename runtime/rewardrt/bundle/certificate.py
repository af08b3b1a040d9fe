"""What export measured of a bundle's graphs against torch, and wrote into the manifest."""

from __future__ import annotations

from dataclasses import dataclass, field

from rewardrt.bundle.spec import OPTIONAL

GOOD_RMS_STD = 0.03  # of a graph that rounds; about what torch in bfloat16 is off


@dataclass(frozen=True)
class Deviation:
    """The largest differences between the runtime's rewards and the reference's over the golden texts."""

    max_absolute: float
    max_relative: float
    max_std: float  # max_absolute over the standard deviation of the reference rewards


@dataclass(frozen=True)
class Fidelity:
    """How near a rounded graph comes to torch in float32, on texts that its calibration did not see, beside bfloat16.

    An rms is in standard deviations of torch's float32 rewards; an agreement is the share of all pairs of texts that
    are ranked the same way, 0..1.
    """

    texts: int
    rms_std: float
    pair_order_agreement: float
    bf16_rms_std: float  # of torch itself in bfloat16
    bf16_pair_order_agreement: float

    @property
    def good(self) -> bool:
        """Whether the rewards may stand for the float32 graph's without being asked for."""
        return self.rms_std <= max(GOOD_RMS_STD, self.bf16_rms_std)


@dataclass(frozen=True)
class Certificate:
    """What was measured at export, and against what. Rewards are raw."""

    precision: str
    reference: str
    texts: int
    reward_std: float  # population standard deviation of the reference rewards
    tolerance_std: float  # `max_std` above this fails
    single: Deviation  # every text alone
    batched: Deviation  # all texts together, right-padded batches
    pair_order_agreement: float  # share of all pairs of texts that both rank the same way, 0..1
    provider: str
    fidelity: Fidelity | None = field(default=None, metadata={OPTIONAL: True})  # of a graph that rounds
    longest: int | None = field(default=None, metadata={OPTIONAL: True})  # tokens of the longest of the texts
    # Windows and original lengths of config.json that no text was longer than: "sliding_window 4096".
    beyond: tuple[str, ...] = field(default=(), metadata={OPTIONAL: True})
