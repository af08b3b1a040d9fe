"""The reference: transformers' own forward pass in float32 with eager attention, one text at a time, without padding.

If the model does not fit into memory, each layer is only loaded while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from rewardrt.bundle.spec import Spec
from rewardrt.errors import CertificateError
from rewardrt.steps import Count, uncounted
from rewardrt.text.tokens import EncodedText
from rewardrt_export.checkpoint import Checkpoint
from rewardrt_export.model.backbone import load, meta_backbone
from rewardrt_export.model.heads import RewardHead
from rewardrt_export.model.layer_by_layer import UnderivableError
from rewardrt_export.precisions.calibrate import LONGEST, Calibration
from rewardrt_export.tracing.experts import through_expert, weight_of_expert


def spread(rewards: Sequence[tuple[float, ...]]) -> float:
    """Return the standard deviation of all rewards of several texts."""
    return float(np.array([reward for each in rewards for reward in each]).std())


def score_with_torch(
    checkpoint: Checkpoint,
    texts: Sequence[EncodedText],
    *,
    dtype: torch.dtype = torch.float32,
    calibration: Calibration | None = None,
    observed: Collection[int] | None = None,
    by_layer: bool = False,
    count: Count = uncounted,
) -> list[tuple[float, ...]]:
    """Return the raw rewards of each text: one, one for each step, or the vector by which it is compared.

    The backbone computes in `dtype`, the head in float32. `calibration` takes in the input of each linear layer for the
    texts with the indices `observed` (None: all), and its gradient for those that are not too long. The torch model is
    in memory only while this runs; with `by_layer`, one of its layers at a time.
    """
    model = meta_backbone(checkpoint.source.config, "eager", "eager" if calibration is None else OBSERVED)
    load(model, checkpoint.backbone.sources, dtype, by_layer=by_layer)
    watching = _Watch(model, calibration) if calibration is not None else None
    head = checkpoint.head()
    head.load_state_dict({name: read() for name, read in head.sources.items()}, strict=True, assign=True)
    head.requires_grad_(False)
    rewards = []
    for index, text in enumerate(texts):
        count(index + 1, len(texts))
        score = partial(_score_text, model, head, checkpoint.spec, text)
        try:
            if watching is not None and (observed is None or index in observed):
                values = watching.score(score, derive=len(text.ids) <= LONGEST)
            else:
                with torch.inference_mode():
                    values = score()
        except (RuntimeError, NotImplementedError) as error:  # weights on the meta device: they are not there
            if not by_layer:
                raise CertificateError(
                    f"torch itself cannot compute {checkpoint.source.architecture} for a text of {len(text.ids)} "
                    f"tokens ({str(error).splitlines()[0]}); config.json does not fit the model that was trained"
                ) from error
            raise CertificateError(
                f"{checkpoint.source.architecture} cannot be computed layer by layer "
                f"({str(error).splitlines()[0]}); export where there is more memory, or with --no-certify"
            ) from error
        rewards.append(tuple(values.tolist()))
    return rewards


def _score_text(model: PreTrainedModel, head: RewardHead, spec: Spec, text: EncodedText) -> torch.Tensor:
    inputs = {"input_ids": text.ids} | ({} if text.type_ids is None else {"token_type_ids": text.type_ids})
    batch: dict[str, Any] = {name: torch.from_numpy(ids).unsqueeze(0) for name, ids in inputs.items()}
    if not spec.causal:  # tokenizers give it too; without it, XLM would treat a pad token inside a text as padding
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    hidden = model(**batch, use_cache=False).last_hidden_state[0].float()
    if spec.input == "steps":
        states = {spec.taps[0].name: hidden[torch.from_numpy(text.positions)]}
    else:
        states = {
            tap.name: hidden[-tap.count :].mean(0, keepdim=True) if tap.rule == "mean" else hidden[[position]]
            for tap, position in zip(spec.taps, text.positions.tolist(), strict=True)
        }
    values: torch.Tensor = head(states)  # [1 or steps, outputs]
    return values[0] if spec.combine.rule == "skew" else values[:, 0]


def _observed_experts(module: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute a mixture expert by expert, with the products that `_Watch` has put into the module."""
    found = torch.zeros_like(hidden)
    for expert in chosen.unique().tolist():
        tokens, places = torch.where(chosen == expert)
        rows = through_expert(module, hidden[tokens], partial(module.observed, expert))
        found = found.index_add(0, tokens, rows * weights[tokens, places, None])
    return found


OBSERVED = "rewardrt-observed"
ALL_EXPERTS_FUNCTIONS.register(OBSERVED, _observed_experts)


class _Watch:
    """Passes the inputs of linear layers to a calibration, for the texts that it should see."""

    def __init__(self, model: PreTrainedModel, calibration: Calibration) -> None:
        self._calibration = calibration
        self._on = self._derive = False
        self.underivable: str | None = None  # why no gradients can be derived layer by layer
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(self._start)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | Conv1D):
                module.register_forward_pre_hook(partial(self._see, f"{name}.weight"))
            elif hasattr(module, "is_transposed") and hasattr(module, "num_experts"):
                module.observed = partial(self._multiply, name, module)
                parts = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
                for part, expert in product(parts, range(module.num_experts)):
                    calibration.expect(weight_of_expert(f"{name}.{part}", expert, turned=not module.is_transposed))

    def score(self, score: Callable[[], torch.Tensor], *, derive: bool) -> torch.Tensor:
        """Score a text and, to `derive`, go back from its reward (or the sum of them) to the inputs of all layers."""
        self._on, self._derive = True, derive and self.underivable is None
        try:
            with torch.set_grad_enabled(self._derive):
                values = score()
        except UnderivableError as error:
            self.underivable = str(error)
            return self.score(score, derive=False)
        if self._derive:
            values.sum().backward()
            self._calibration.texts += 1
        self._on = False
        self._calibration.store()
        return values.detach()

    @property
    def _observing(self) -> bool:
        """Whether what runs now is to be seen: not a layer that runs without gradients and will run again with them."""
        return self._on and torch.is_grad_enabled() == self._derive

    def _start(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], embedding: torch.Tensor) -> Any:
        if self._on and self._derive:
            # Where the way back ends; a copy goes on, since some classes scale the embedding in place.
            return embedding.requires_grad_(True).clone()
        return None

    def _multiply(self, name: str, experts: Any, expert: int, part: str, rows: torch.Tensor) -> torch.Tensor:
        """Multiply rows by one expert's weight, and record it like a linear layer's."""
        weight = getattr(experts, part)[expert]
        if self._observing:
            own = weight_of_expert(f"{name}.{part}", expert, turned=not experts.is_transposed)
            rows = self._calibration.observe(own, rows)
            if torch.is_grad_enabled():
                weight = weight.detach()  # a leaf tensor, which gets its own gradient
                self._calibration.watch(own, weight, transposed=experts.is_transposed)
        bias = getattr(experts, f"{part}_bias")[expert] if experts.has_bias else None
        return torch.nn.functional.linear(rows, weight.T if experts.is_transposed else weight, bias)

    def _see(self, name: str, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
        if not self._observing:
            return None
        weight: Any = module.weight
        if self._derive and not weight.requires_grad:  # the first time, or after its layer was read again
            self._calibration.watch(name, weight, transposed=isinstance(module, Conv1D))
        return (self._calibration.observe(name, inputs[0]), *inputs[1:])
