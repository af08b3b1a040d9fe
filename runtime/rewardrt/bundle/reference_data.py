"""Whose rewards a bundle normalises by, where they were measured after the export."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReferenceData:
    """The data whose raw rewards the mean and std of `spec.normalise` are of, measured by `rewardrt normalize`.

    `files` has the SHA-256 of each file by its name, without its folder; `texts` are the rewards that were measured, of
    `rows` rows; `truncated` of the texts were cut.
    """

    files: dict[str, str]
    rows: int
    texts: int
    truncated: int
    precision: str
    provider: str
    created: str  # UTC, ISO 8601
