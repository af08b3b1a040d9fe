"""The data on which a bundle's normalisation was measured, if that was done after the export."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReferenceData:
    """The data whose raw rewards gave the mean and std of `spec.normalise`, measured by `rewardrt normalize`.

    `files` maps each file's name, without its folder, to its SHA-256. `texts` is the number of rewards measured, from
    `rows` rows; `truncated` of these texts were cut.
    """

    files: dict[str, str]
    rows: int
    texts: int
    truncated: int
    precision: str
    provider: str
    created: str  # UTC, ISO 8601
