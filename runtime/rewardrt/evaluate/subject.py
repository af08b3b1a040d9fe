"""What was evaluated: a bundle, the graph that ran, and where."""

from __future__ import annotations

from dataclasses import dataclass

from rewardrt.bundle.certificate import Certificate
from rewardrt.reward_model import RewardModel


@dataclass(frozen=True)
class Subject:
    """A model, as described in the report; `labels` are its objectives."""

    bundle: str
    family: str
    backbone: str
    parameters: int
    checkpoint: str
    precision: str
    runs_on: str
    normalised: bool
    max_length: int
    labels: tuple[str, ...]
    certificate: Certificate | None
    uncertified: bool

    @classmethod
    def of(cls, model: RewardModel, normalize: bool | None) -> Subject:
        """Describe a model."""
        manifest, spec = model.bundle.manifest, model.spec
        return cls(
            bundle=model.bundle.short_name,
            family=spec.family,
            backbone=spec.backbone,
            parameters=manifest.provenance.parameters,
            checkpoint=manifest.provenance.checkpoint,
            precision=model.precision,
            runs_on=model.session.runs_on,
            normalised=spec.normalise_by_default if normalize is None else normalize,
            max_length=spec.max_length,
            labels=tuple(spec.output.labels),
            certificate=model.bundle.certificate(model.precision),
            uncertified=manifest.uncertified,
        )

    @property
    def graph(self) -> str:
        """The graph and where it ran: `int8 on cpu`."""
        return f"{self.precision} on {self.runs_on}"
