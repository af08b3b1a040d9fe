"""The heads of a spec as one torch module: from the states at the taps to the reward and its objectives.

The same module is traced into the graph and, with real weights, computes the end of the certificate's reference. Its
formulas are therefore checked by tests that write out each family's formula independently.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from rewardrt.bundle.spec import Activation, Head, Layer, Spec
from rewardrt.errors import CheckpointError
from rewardrt_export.source.weights import StoredTensor

ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "leaky_relu": nn.functional.leaky_relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": partial(nn.functional.gelu, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "selu": nn.functional.selu,
    "silu": nn.functional.silu,
}
Reader = Callable[[], torch.Tensor]
BATCH_NORM_EPS = 1e-5  # torch's default, which no checkpoint states


class RewardHead(nn.Module):
    """The heads on the meta device; `sources` has a reader for each parameter.

    Raises CheckpointError for a tensor that is missing, has a shape that does not fit the layer before it, is not
    finite, or is all zeros: such a head was lost or never trained.
    """

    def __init__(self, spec: Spec, stored: dict[str, StoredTensor], width: int) -> None:
        super().__init__()
        self.spec = spec
        self.sources: dict[str, Reader] = {}
        self.tensors: set[str] = set()  # names of the checkpoint's tensors
        sizes = [self._add_head(index, head, stored, width * len(head.taps)) for index, head in enumerate(spec.heads)]
        combine = spec.combine
        if combine.matrix is not None:
            self._add("matrix", combine.matrix, stored, (sizes[0], sizes[0]))
        if combine.scale_tensor is not None:
            self._add("scale", combine.scale_tensor, stored, (1,))
        _check_sizes(spec, sizes)

    def forward(self, states: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return [..., 1 + objectives] from one state [..., hidden] for each tap name.

        For the combine rule skew, return the vectors [..., values] by which texts are compared.
        """
        values = [self._run_head(index, head, states) for index, head in enumerate(self.spec.heads)]
        combine, output = self.spec.combine, self.spec.output
        first = values[0]
        if combine.rule == "dot":
            reward = _weighted_sum(first, torch.tensor(combine.weights))
        elif combine.rule == "gate":
            scale = self.get_parameter("scale") if combine.scale_tensor is not None else combine.scale
            gate = (torch.softmax(values[1] / combine.temperature, -1) if combine.softmax else values[1]) * scale
            mixed = first @ self.get_parameter("matrix") if combine.matrix is not None else first
            reward = _weighted_sum(gate * mixed, torch.ones(mixed.shape[-1]))
        elif combine.rule == "difference":
            difference = values[0] - values[1] if len(values) == 2 else first[..., :1] - first[..., 1:2]
            reward = _weighted_sum(difference, torch.full((difference.shape[-1],), 1 / difference.shape[-1]))
        elif combine.rule == "skew":
            reward = first / first.norm(dim=-1, keepdim=True) if combine.unit else first
            if len(values) == 2:
                # Both texts of a comparison have the same gate, so each vector is multiplied by its square root.
                gate = torch.softmax(values[1] / combine.temperature, -1) * combine.scale
                reward = reward * torch.sqrt(gate).repeat_interleave(2, -1)
        else:
            reward = first
        if output.function == "softmax":
            reward = torch.softmax(reward, -1)[..., output.index : output.index + 1]
        elif output.function == "log_odds":
            others = [place for place in range(reward.shape[-1]) if place != output.index]
            # Written out, because logsumexp adds in an order that depends on the batch.
            most = reward[..., others].amax(-1, keepdim=True)
            rest = _weighted_sum(torch.exp(reward[..., others] - most), torch.ones(len(others)))
            reward = reward[..., output.index : output.index + 1] - most - torch.log(rest)
        elif output.function == "sigmoid":
            reward = torch.sigmoid(reward)
        elif output.function == "negate":
            reward = -reward
        return torch.cat([reward, first], -1) if output.labels else reward

    def _run_head(self, index: int, head: Head, states: dict[str, torch.Tensor]) -> torch.Tensor:
        state = torch.cat([states[tap] for tap in head.taps], -1) if len(head.taps) > 1 else states[head.taps[0]]
        for number, layer in enumerate(head.layers):
            bias = getattr(self, f"bias_{index}_{number}", None)
            state = nn.functional.linear(state, getattr(self, f"weight_{index}_{number}"), bias)
            state = ACTIVATIONS[layer.activation](state)
            if layer.batch_norm is not None:
                mean, variance, weight, bias = (
                    self.get_parameter(f"{part}_{index}_{number}") for part in ("mean", "variance", "scale", "shift")
                )
                state = (state - mean) * torch.rsqrt(variance + BATCH_NORM_EPS) * weight + bias
            if layer.norm is not None:
                weight = self.get_parameter(f"norm_{index}_{number}")
                bias = getattr(self, f"norm_bias_{index}_{number}", None)
                state = nn.functional.layer_norm(state, state.shape[-1:], weight, bias, layer.norm_eps)
        if head.scale != 1.0:
            state = state * head.scale
        if head.softcap:
            state = head.softcap * torch.tanh(state / head.softcap)
        if head.reduce != "none":
            groups = state.unflatten(-1, (-1, head.group))
            weights = torch.full((head.group,), 1 / head.group)
            if head.reduce == "expectation":
                groups, weights = torch.softmax(groups, -1), torch.linspace(head.low, head.high, head.group)
            state = _weighted_sum(groups, weights).squeeze(-1)
        return state - torch.tensor(head.minus) if head.minus else state

    def _add_head(self, index: int, head: Head, stored: dict[str, StoredTensor], width: int) -> int:
        for number, layer in enumerate(head.layers):
            rows = self._add(f"weight_{index}_{number}", layer.weight, stored, (None, width), layer)
            if layer.bias is not None:
                self._add(f"bias_{index}_{number}", layer.bias, stored, (rows,) if not layer.rows else None, layer)
            width = len(layer.rows) or rows
            if layer.batch_norm is not None:
                names = {"mean": "running_mean", "variance": "running_var", "scale": "weight", "shift": "bias"}
                for part, name in names.items():
                    self._add(f"{part}_{index}_{number}", f"{layer.batch_norm}.{name}", stored, (width,))
                self.tensors.add(f"{layer.batch_norm}.num_batches_tracked")  # a counter that only training reads
            for kind, tensor_name in (("norm", layer.norm), ("norm_bias", layer.norm_bias)):
                if tensor_name is not None:
                    self._add(f"{kind}_{index}_{number}", tensor_name, stored, (width,))
        if width % head.group:
            raise CheckpointError(f"{head.layers[-1].weight}: {width} outputs are no groups of {head.group}")
        if head.minus and len(head.minus) != width // head.group:
            raise CheckpointError(f"a head of {width // head.group} values, but {len(head.minus)} numbers to subtract")
        return width // head.group

    def _add(
        self,
        name: str,
        tensor_name: str,
        stored: dict[str, StoredTensor],
        shape: tuple[int | None, ...] | None,
        layer: Layer | None = None,
    ) -> int:
        """Register one parameter and return its number of rows on disk.

        `shape` is the expected shape, with None for an axis of any size; None as a whole accepts any shape.
        """
        expected = "any shape" if shape is None else [size if size is not None else "outputs" for size in shape]
        if tensor_name not in stored:
            like = sorted(other for other in stored if other.count(".") <= 1)
            near = f"near it: {', '.join(like[:6])}" if like else "nothing like it"
            raise CheckpointError(
                f"no reward head: the {self.spec.family} spec needs {tensor_name} {expected}, and the checkpoint has "
                f"not ({near}); it was lost or never trained"
            )
        tensor = stored[tensor_name]
        found = tensor.shape
        if shape is not None and (
            len(found) != len(shape) or any(b not in (None, a) for a, b in zip(found, shape, strict=True))
        ):
            raise CheckpointError(f"{tensor_name}: expected shape {expected} for this backbone, found {list(found)}")
        rows = layer.rows if layer is not None else ()
        if rows and max(rows) >= found[0]:
            raise CheckpointError(f"{tensor_name}: has {found[0]} rows, the spec reads row {max(rows)}")

        def read() -> torch.Tensor:
            value = tensor.read()
            return (value[list(rows)] if rows else value).to(torch.float32)

        _check_values(tensor_name, read())
        self.tensors.add(tensor_name)
        self.sources[name] = read
        size = (len(rows), *found[1:]) if rows else found
        self.register_parameter(name, nn.Parameter(torch.empty(size, device="meta"), requires_grad=False))
        return found[0] if found else 1


def _weighted_sum(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum over the last axis, which is kept, computed as a matrix product.

    onnxruntime's ReduceSum adds in an order that depends on a row's place in memory, and so on the batch.
    """
    return values @ weights.unsqueeze(-1)


def _check_values(name: str, values: torch.Tensor) -> None:
    if not torch.isfinite(values).all():
        raise CheckpointError(f"{name}: holds values that are not finite (NaN or infinity); the training diverged")
    if values.dim() > 1 and not values.any():
        raise CheckpointError(f"{name}: all zeros; the head was never trained")


def _check_sizes(spec: Spec, sizes: list[int]) -> None:
    """Check that the heads give as many values as the combine rule and the output need."""
    rule, name = spec.combine.rule, spec.heads[0].layers[-1].weight
    chooses = spec.output.function in ("softmax", "log_odds")
    if rule == "none" and not chooses and sizes != [1]:
        raise CheckpointError(
            f"{name}: {sizes[0]} outputs; expected a reward model with one, or --weights for each{_named(spec)}"
        )
    if rule == "dot" and len(spec.combine.weights) != sizes[0]:
        found = len(spec.combine.weights)
        raise CheckpointError(f"{name}: {sizes[0]} outputs, but {found} weights; expected one for each{_named(spec)}")
    if rule == "gate" and (len(sizes) != 2 or sizes[0] != sizes[1]):
        raise CheckpointError(f"a gate needs two heads with as many outputs each, found {sizes}")
    if rule == "difference" and sizes != [2] and (len(sizes) != 2 or sizes[0] != sizes[1]):
        raise CheckpointError(f"a difference needs two heads with as many outputs each, or one with two, found {sizes}")
    if rule == "skew" and (sizes[0] % 2 or len(sizes) > 2 or (len(sizes) == 2 and 2 * sizes[1] != sizes[0])):
        raise CheckpointError(
            f"{name}: {sizes[0]} outputs; expected an even number for a skew product, and half as many of its gate, "
            f"found {sizes[1:] or 'none'}"
        )
    if chooses and not spec.output.index < sizes[0]:
        raise CheckpointError(f"{name}: {sizes[0]} outputs, the spec takes the softmax's number {spec.output.index}")
    if spec.output.function == "log_odds" and sizes[0] < 2:
        raise CheckpointError(f"{name}: 1 output; log-odds need at least two")
    if spec.output.labels and len(spec.output.labels) != sizes[0]:
        raise CheckpointError(f"{name}: {sizes[0]} outputs, but {len(spec.output.labels)} labels")


def _named(spec: Spec) -> str:
    return f" ({', '.join(spec.output.labels)})" if spec.output.labels else ""
