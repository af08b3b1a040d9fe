"""Layers with a recurrent state for tracing: linear attention and Mamba.

transformers implements them as functions in a model's module, which optional kernels may replace. During a trace they
are replaced by the functions below. All are recurrences over tokens t with a state S [keys, values] for each head:

    S_t = exp(g_t) S_{t-1} + k_t v_t^T                                  gated: Mamba (arXiv 2312.00752), Mamba-2
    S_t = exp(g_t) S_{t-1} + b_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T   the gated delta rule (arXiv 2412.06464)
    o_t = S_t^T q_t

onnxruntime has one operator for these, `LinearAttention`, which computes one token after the other, so a text gets the
same bits however it is split into calls. The convolutions before them are sums of shifted products, element by element;
their state is the last tokens of their input. States of a past are inputs and outputs, like keys and values: see
`layer_states`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import FLOAT
from onnxscript.values import Op, Opset
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

DOMAIN = "com.microsoft"
OLDEST_ONNXRUNTIME = "1.26"  # the oldest version with the operator; models pass their certificates with it
NORM_EPS = 1e-6  # added to the squared norms of queries and keys, as in transformers' functions


@torch.library.custom_op("rewardrt::linear_attention", mutates_args=())
def linear_attention(
    query: torch.Tensor,  # [batch, tokens, heads * keys]
    key: torch.Tensor,  # [batch, tokens, heads * keys]
    value: torch.Tensor,  # [batch, tokens, heads * values]
    decay: torch.Tensor,  # [batch, tokens, heads], or heads * keys: g
    past_state: torch.Tensor,  # [batch, heads, keys, values]
    beta: torch.Tensor | None,  # [batch, tokens, heads]: b; None: the gated rule
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a recurrence over the tokens of each text; return o [batch, tokens, heads * values] and the last S."""
    raise NotImplementedError("this operator exists to be traced")


@linear_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    past_state: torch.Tensor,
    beta: torch.Tensor | None,
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(value), torch.empty_like(past_state)


_OPTIONAL = OpSchema.FormalParameterOption.Optional
_SCHEMA = OpSchema(
    "LinearAttention",
    DOMAIN,
    1,
    inputs=[
        *(OpSchema.FormalParameter(name, "T") for name in ("query", "key", "value")),
        *(OpSchema.FormalParameter(name, "T", param_option=_OPTIONAL) for name in ("past_state", "decay", "beta")),
    ],
    outputs=[OpSchema.FormalParameter("output", "T"), OpSchema.FormalParameter("present_state", "T")],
    type_constraints=[("T", ["tensor(float)"], "")],
    attributes=[
        OpSchema.Attribute("q_num_heads", OpSchema.AttrType.INT, ""),
        OpSchema.Attribute("kv_num_heads", OpSchema.AttrType.INT, ""),
        OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT, ""),
        OpSchema.Attribute("update_rule", OpSchema.AttrType.STRING, ""),
    ],
)
_LINEAR_ATTENTION = Op(Opset(DOMAIN, 1), "LinearAttention", _SCHEMA)


def _onnx_linear_attention(
    query: FLOAT, key: FLOAT, value: FLOAT, decay: FLOAT, past_state: FLOAT, beta: FLOAT | None, heads: int
) -> tuple[FLOAT, FLOAT]:
    rule = "gated" if beta is None else "gated_delta"
    given = {"q_num_heads": heads, "kv_num_heads": heads, "scale": 1.0, "update_rule": rule}
    found: tuple[FLOAT, FLOAT] = _LINEAR_ATTENTION(query, key, value, past_state, decay, beta, **given)
    return found


# Translation of the custom operator to ONNX.
STATE_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.rewardrt.linear_attention.default: _onnx_linear_attention,
}


class LayerStates:
    """The states of a forward pass, given to the functions that have one in the order of their calls."""

    def __init__(self) -> None:
        self._past: list[torch.Tensor] | None = None
        self.present: list[torch.Tensor] = []

    def begin(self, past: list[torch.Tensor] | None) -> None:
        """Begin a pass with these states; None: the states after no tokens, of any shape."""
        self._past, self.present = past, []

    def past(self, like: torch.Tensor, *sizes: int) -> torch.Tensor:
        """Return the next function's past state, [batch, *sizes] float32; zeros if there is no past."""
        if self._past is not None:
            return self._past[len(self.present)]
        return like.new_zeros((like.shape[0], *sizes), dtype=torch.float32)

    def add(self, state: torch.Tensor) -> None:
        """Record the next function's state after all tokens."""
        self.present.append(state)


layer_states = LayerStates()


def _recurrence(
    query: torch.Tensor,  # [batch, tokens, heads * keys], as is the key
    key: torch.Tensor,
    value: torch.Tensor,  # [batch, tokens, heads * values]
    decay: torch.Tensor,  # [batch, tokens, heads], or heads * keys
    beta: torch.Tensor | None,
    heads: int,
) -> torch.Tensor:
    """Compute a recurrence that continues from the pass's states; return o [batch, tokens, heads * values]."""
    past = layer_states.past(value, heads, key.shape[2] // heads, value.shape[2] // heads)
    found, present = torch.ops.rewardrt.linear_attention(query, key, value, decay, past, beta, heads)
    layer_states.add(present)
    return found


def _causal_conv1d(
    hidden_states: torch.Tensor,  # [batch, channels, tokens]
    weight: torch.Tensor,  # [channels, kernel]
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **others: Any,
) -> torch.Tensor:
    """Convolve each channel with its own kernel, over a token and the ones before it."""
    tokens, size = hidden_states.shape[2], weight.shape[1]
    padded = torch.cat([layer_states.past(hidden_states, hidden_states.shape[1], size - 1), hidden_states], dim=2)
    layer_states.add(padded[:, :, tokens:])
    found = padded[:, :, :tokens] * weight[:, :1]
    for place in range(1, size):
        found = found + padded[:, :, place : place + tokens] * weight[:, place : place + 1]
    if bias is not None:
        found = found + bias.unsqueeze(-1)
    return found if activation is None else ACT2FN[activation](found)


def _flat(values: torch.Tensor) -> torch.Tensor:
    """Reshape [batch, tokens, heads, size] to [batch, tokens, heads * size], in float32."""
    return values.float().flatten(2)


def _delta_rule(
    query: torch.Tensor,  # [batch, tokens, key heads, keys], as is the key
    key: torch.Tensor,
    value: torch.Tensor,  # [batch, tokens, heads, values]
    g: torch.Tensor,  # [batch, tokens, heads]
    beta: torch.Tensor,  # [batch, tokens, heads]
    use_qk_l2norm_in_kernel: bool = False,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Replace `torch_chunk_gated_delta_rule`."""
    heads, shared = value.shape[2], value.shape[2] // key.shape[2]
    query, key = query.float(), key.float()
    if use_qk_l2norm_in_kernel:
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPS) for x in (query, key))
    query = query * query.shape[3] ** -0.5
    query, key = (x.repeat_interleave(shared, dim=2) if shared > 1 else x for x in (query, key))
    found = _recurrence(_flat(query), _flat(key), _flat(value), g.float(), beta.float(), heads)
    return found.view(value.shape), None


def _mamba2(
    hidden_states: torch.Tensor,  # [batch, tokens, heads, values]
    dt: torch.Tensor,  # [batch, tokens, heads]
    A: torch.Tensor,  # [heads]
    B: torch.Tensor,  # [batch, tokens, groups, keys], as is C
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,  # [heads]
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **others: Any,
) -> torch.Tensor:
    """Replace `mamba2_chunk_scan`: q = C, k = B, v = dt x, g = A dt, and D x is added."""
    heads, shared = hidden_states.shape[2], hidden_states.shape[2] // B.shape[2]
    dt = dt if dt_bias is None else dt + dt_bias
    dt = torch.clamp(nn.functional.softplus(dt) if dt_softplus else dt, dt_limit[0], dt_limit[1])
    B, C = (x.repeat_interleave(shared, dim=2) if shared > 1 else x for x in (B, C))
    value = hidden_states * dt.unsqueeze(-1)
    found = _recurrence(_flat(C), _flat(B), _flat(value), A * dt, None, heads)
    found = found.view(hidden_states.shape)
    return found if D is None else found + D.unsqueeze(-1) * hidden_states


def _mamba(
    hidden_states: torch.Tensor,  # [batch, channels, tokens]
    dt: torch.Tensor,  # [batch, channels, tokens]
    A: torch.Tensor,  # [channels, keys]
    B: torch.Tensor,  # [batch, keys, tokens], as is C
    C: torch.Tensor,
    D: torch.Tensor | None = None,  # [channels]
    z: torch.Tensor | None = None,  # [batch, channels, tokens]
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    **others: Any,
) -> torch.Tensor:
    """Replace `mamba_selective_scan`: every channel is a head with one value, and each key decays on its own."""
    batch, channels, tokens = hidden_states.shape
    keys = A.shape[1]
    dt = dt if delta_bias is None else dt + delta_bias.unsqueeze(-1)
    dt = (nn.functional.softplus(dt) if delta_softplus else dt).transpose(1, 2)  # [batch, tokens, channels]
    x = hidden_states.transpose(1, 2)
    B, C = (
        each.transpose(1, 2).unsqueeze(2).expand(batch, tokens, channels, keys).reshape(batch, tokens, channels * keys)
        for each in (B, C)
    )
    decay = (dt.unsqueeze(-1) * A).reshape(batch, tokens, channels * keys)
    found = _recurrence(C, B, dt * x, decay, None, channels)
    if D is not None:
        found = found + D * x
    found = found.transpose(1, 2)
    return found if z is None else found * nn.functional.silu(z)


# Replacements for transformers' functions of these names, in the module of a model.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _causal_conv1d,
    "mamba2_chunk_scan": _mamba2,
    "mamba_selective_scan": _mamba,
    "torch_chunk_gated_delta_rule": _delta_rule,
}


def oldest_onnxruntime(graph: ir.Graph) -> str:
    """Return the oldest onnxruntime with the graph's operators, or "" if the package's own minimum has them."""
    ours = any(node.domain == DOMAIN and node.op_type == "LinearAttention" for node in graph)
    return OLDEST_ONNXRUNTIME if ours else ""


def has_state(backbone: PreTrainedModel) -> bool:
    """Whether a backbone's layers keep a state from token to token by one of these functions."""
    return not _FUNCTIONS.keys().isdisjoint(vars(sys.modules[type(backbone).__module__]))


@contextlib.contextmanager
def state_functions(backbone: PreTrainedModel) -> Iterator[None]:
    """Make a backbone's layers with state call the replacements inside the block."""
    home = vars(sys.modules[type(backbone).__module__])
    kept = {name: home[name] for name in _FUNCTIONS if name in home}
    try:
        home.update({name: _FUNCTIONS[name] for name in kept})
        yield
    finally:
        home.update(kept)
