"""The graph: one traced forward pass, a decoder's with a shared prefix going in and coming out.

The backbone is transformers' own code, untouched. Two of its registered hooks make it traceable: attention becomes one
custom operator a layer (one standard ONNX `Attention` node), and the mask function returns nothing, because
causality, the window, the prefix and the padding are the hooks' business. A pass before the trace compares what each
layer's mask would have hidden with what its attention is told (`attention_masks`). Tracing runs on fake tensors: no
weight is read.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import BOOL, FLOAT, opset23
from optimum.utils import NormalizedConfigManager
from optimum.utils.normalized_config import NormalizedTextConfigWithGQA
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from rewardrt.bundle.spec import Spec
from rewardrt.errors import TraceError
from rewardrt_export.model.backbone import backbone_class, fill_with_fakes, first_position
from rewardrt_export.model.heads import RewardHead
from rewardrt_export.source.weights import first_line
from rewardrt_export.tracing.attention_masks import mask_hook, watch_masks, watched_masks

# The names under which the hooks are registered with transformers, for decoders and for encoders.
ATTENTION, BIDIRECTIONAL = "rewardrt", "rewardrt-bidirectional"
OPSET = 23  # the first with Attention, RotaryEmbedding and RMSNormalization


@torch.library.custom_op("rewardrt::attention", mutates_args=())
def attention(
    query: torch.Tensor,  # [batch, heads, tokens, head_dim]
    key: torch.Tensor,  # [batch, kv_heads, tokens, head_dim]
    value: torch.Tensor,  # [batch, kv_heads, tokens, value_dim]
    past_key: torch.Tensor,  # [batch, kv_heads, past, head_dim]
    past_value: torch.Tensor,  # [batch, kv_heads, past, value_dim]
    scale: float,
    softcap: float,  # 0: none
    window: int,  # 0: every earlier token; else the token itself and the `window - 1` before it
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal attention over a past and new tokens; gives the output, and the keys and values of all of them."""
    raise NotImplementedError("this operator exists to be traced")


@attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, tokens, _ = query.shape
    total = past_key.shape[2] + tokens
    return (
        query.new_empty(batch, heads, tokens, value.shape[3]),
        key.new_empty(batch, key.shape[1], total, key.shape[3]),
        value.new_empty(batch, value.shape[1], total, value.shape[3]),
    )


def onnx_attention(
    query: FLOAT,
    key: FLOAT,
    value: FLOAT,
    past_key: FLOAT,
    past_value: FLOAT,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[FLOAT, FLOAT, FLOAT]:
    """Write one `attention` call as ONNX: a single node, with a mask only where a window needs one."""
    op: Any = opset23
    if window:
        mask = _window_mask(query, past_key, window)
        return op.Attention(query, key, value, mask, past_key, past_value, scale=scale, softcap=softcap)[:3]
    return op.Attention(query, key, value, None, past_key, past_value, is_causal=1, scale=scale, softcap=softcap)[:3]


def _window_mask(query: FLOAT, past_key: FLOAT, window: int) -> BOOL:
    """Make the mask [tokens, past + tokens]: true where a token may look, 0 <= distance < window."""
    op: Any = opset23
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    past = op.Squeeze(op.Shape(past_key, start=2, end=3))
    total = op.Add(past, op.Squeeze(op.Shape(query, start=2, end=3)))
    asking = op.Unsqueeze(op.Range(past, total, one), op.Constant(value_ints=[1]))
    asked = op.Unsqueeze(op.Range(zero, total, one), op.Constant(value_ints=[0]))
    distance = op.Sub(asking, asked)
    return op.And(op.GreaterOrEqual(distance, zero), op.Less(distance, op.Constant(value_int=window)))


@torch.library.custom_op("rewardrt::bidirectional_attention", mutates_args=())
def bidirectional_attention(
    query: torch.Tensor,  # [batch, heads, tokens, head_dim]
    key: torch.Tensor,  # [batch, kv_heads, tokens, head_dim]
    value: torch.Tensor,  # [batch, kv_heads, tokens, value_dim]
    mask: torch.Tensor,  # [batch, 1, tokens, tokens] bool: true where a token may look
    scale: float,
    softcap: float,  # 0: none
) -> torch.Tensor:
    """Attention of each token to those before and after it."""
    raise NotImplementedError("this operator exists to be traced")


@bidirectional_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


def onnx_bidirectional_attention(
    query: FLOAT, key: FLOAT, value: FLOAT, mask: BOOL, scale: float, softcap: float
) -> FLOAT:
    """Write one `bidirectional_attention` call as ONNX: a single node."""
    op: Any = opset23
    return op.Attention(query, key, value, mask, scale=scale, softcap=softcap)[0]


class _Prefix:
    """The past of the forward pass being traced, handed to the attention hook layer by layer."""

    def __init__(self) -> None:
        self.past: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.present: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


_prefix = _Prefix()
# What transformers may pass to an attention function without changing its maths.
_HARMLESS = {
    "cache_position", "deterministic", "is_causal", "layer_type", "num_items_in_batch", "output_attentions",
    "output_hidden_states", "past_key_values", "position_embeddings", "position_ids", "return_dict", "use_cache",
}  # fmt: skip


def _attention_hook(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Stand in for transformers' attention functions; returns [batch, tokens, heads, value_dim] as they do."""
    odd = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
    masked = attention_mask is not None and watched_masks() is None
    if odd or masked or getattr(module, "is_causal", True) is not True:
        raise TraceError(
            f"{type(module).__name__} asks for attention that is not plainly causal ({', '.join(odd) or 'mask'}); "
            "this backbone cannot be exported yet"
        )
    window = int(sliding_window or 0)
    if (watch := watched_masks()) is not None:
        watch.compare(module, attention_mask, window, bidirectional=False)
    layer = len(_prefix.present)
    past_key, past_value = _prefix.past[layer]
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    output, *present = torch.ops.rewardrt.attention(
        query, key, value, past_key, past_value, scale, float(softcap or 0.0), window
    )
    _prefix.present[layer] = (present[0], present[1])
    return output.transpose(1, 2).contiguous(), None


class _Padding:
    """The masks of the encoder's forward pass being traced, one for each window, and how many layers asked for them."""

    def __init__(self, tokens: int, lengths: torch.Tensor) -> None:
        place = torch.arange(tokens)
        self._distance = (place.unsqueeze(1) - place.unsqueeze(0)).abs()  # [tokens, tokens]
        self._inside = place.view(1, 1, 1, -1) < lengths.view(-1, 1, 1, 1)
        self._masks: dict[int, torch.Tensor] = {}
        self.layers = 0

    def mask(self, window: int) -> torch.Tensor:
        """Return [batch, 1, tokens, tokens]; `window` 0: the whole text, else `window - 1` tokens on either side.

        Padding sees itself too: it may be far from every token of the text, and a softmax must not be over nothing.
        """
        self.layers += 1
        if window not in self._masks:
            inside = self._inside & (self._distance < window) if window else self._inside
            self._masks[window] = inside | (self._distance == 0)
        return self._masks[window]


_padding: list[_Padding] = []  # of the pass being traced: the hook below is called from deep inside transformers


def _bidirectional_hook(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Stand in for transformers' attention functions in an encoder, as `_attention_hook` does in a decoder."""
    odd = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
    masked = attention_mask is not None and watched_masks() is None
    if odd or masked or getattr(module, "is_causal", False):
        raise TraceError(
            f"{type(module).__name__} asks for attention that is not plainly bidirectional "
            f"({', '.join(odd) or 'mask'}); this backbone cannot be exported yet"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    window = int(sliding_window or 0)
    if (watch := watched_masks()) is not None:
        watch.compare(module, attention_mask, window, bidirectional=True)
    mask = _padding[-1].mask(window)
    output = torch.ops.rewardrt.bidirectional_attention(query, key, value, mask, scale, float(softcap or 0.0))
    return output.transpose(1, 2).contiguous(), None


for _name, _hook in ((ATTENTION, _attention_hook), (BIDIRECTIONAL, _bidirectional_hook)):
    AttentionInterface.register(_name, _hook)
    AttentionMaskInterface.register(_name, mask_hook)


def attention_name(config: PretrainedConfig, causal: bool) -> str:
    """Return the attention implementation to trace a backbone with.

    An encoder that does not go through transformers' hook (DeBERTa's attention is its own) is traced as it is: it masks
    the padding by itself.
    """
    if causal:
        return ATTENTION
    return BIDIRECTIONAL if backbone_class(config)._supports_attention_backend else "eager"


class CausalGraph(nn.Module):
    """What is traced of a decoder: backbone over a past and new tokens, states at the taps, heads.

    With `every_token`, the heads over the state of every token too.
    """

    def __init__(self, backbone: PreTrainedModel, head: RewardHead, every_token: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.every_token = every_token

    def forward(
        self,
        input_ids: torch.Tensor,  # [batch, tokens] int64, right-padded
        lengths: torch.Tensor,  # [batch] int64
        past_keys: list[torch.Tensor],
        past_values: list[torch.Tensor],
        positions: torch.Tensor | None = None,  # [batch, taps] int64
    ) -> tuple[torch.Tensor, ...]:
        _prefix.past, _prefix.present = list(zip(past_keys, past_values, strict=True)), {}
        batch, tokens = input_ids.shape
        place = (torch.arange(tokens) + past_keys[0].shape[2]).unsqueeze(0).expand(batch, tokens)
        hidden = self.backbone(input_ids=input_ids, position_ids=place, use_cache=False).last_hidden_state
        if len(_prefix.present) != len(past_keys):
            raise TraceError(
                f"{type(self.backbone).__name__} ran {len(_prefix.present)} attention layers where its config says "
                f"{len(past_keys)}; this backbone cannot be exported yet"
            )
        spec = self.head.spec
        every: tuple[torch.Tensor, ...] = ()
        if self.every_token:
            every = (self.head({spec.taps[0].name: hidden}),)  # [batch, tokens, outputs]
        if spec.input == "steps":
            rewards = every[0][torch.arange(batch), lengths - 1]
        else:  # not taken from `every`: a reward has the same bits in a graph without it
            rewards = self.head(tap_states(spec, hidden, lengths, positions))
        return (rewards, *every, *[tensor for layer in range(len(past_keys)) for tensor in _prefix.present[layer]])


class EncoderGraph(nn.Module):
    """What is traced of an encoder: backbone over whole texts, states at the taps, heads.

    What is padding goes by `lengths` alone, never by an id. So do positions, unless the class counts them by the ids.
    """

    def __init__(self, backbone: PreTrainedModel, head: RewardHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        # RoBERTa and its kin count positions over the ids that are not the padding id, wherever that stands in a text.
        self.counts_positions = first_position(backbone) > 0
        self.takes_type_ids = "token_type_ids" in inspect.signature(backbone.forward).parameters

    def forward(
        self,
        input_ids: torch.Tensor,  # [batch, tokens] int64, right-padded
        lengths: torch.Tensor,  # [batch] int64
        token_type_ids: torch.Tensor | None = None,  # [batch, tokens] int64
        positions: torch.Tensor | None = None,  # [batch, taps] int64
    ) -> torch.Tensor:
        batch, tokens = input_ids.shape
        _padding[:] = [padding := _Padding(tokens, lengths)]
        place = torch.arange(tokens).unsqueeze(0)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": (place < lengths.unsqueeze(1)).long(),
        }
        if not self.counts_positions:
            inputs["position_ids"] = place.expand(batch, tokens)
        if self.takes_type_ids:
            inputs["token_type_ids"] = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        hidden = self.backbone(**inputs).last_hidden_state
        config = self.backbone.config
        if config._attn_implementation == BIDIRECTIONAL and padding.layers != config.num_hidden_layers:
            raise TraceError(
                f"{type(self.backbone).__name__} ran {padding.layers} attention layers where its config says "
                f"{config.num_hidden_layers}; this backbone cannot be exported yet"
            )
        return self.head(tap_states(self.head.spec, hidden, lengths, positions))


def tap_states(
    spec: Spec, hidden: torch.Tensor, lengths: torch.Tensor, positions: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Return the state [batch, hidden] of every tap, from hidden states [batch, tokens, hidden].

    The one position tap of a causal model is the text's last token: the host leaves out what follows.
    """
    rows = torch.arange(hidden.shape[0])
    states = {}
    for index, tap in enumerate(spec.taps):
        if tap.rule == "mean":
            place = torch.arange(hidden.shape[1]).unsqueeze(0)
            inside = place < lengths.unsqueeze(1)
            if tap.count:
                inside = inside & (place >= lengths.unsqueeze(1) - tap.count)
            weights = inside.to(hidden.dtype)
            # A product, not a sum over tokens: onnxruntime adds those in another order when the batch is another.
            total = torch.bmm(weights.unsqueeze(1), hidden).squeeze(1)
            states[tap.name] = total / weights.sum(1, keepdim=True)
        elif tap.rule == "first":
            states[tap.name] = hidden[:, 0]
        else:
            states[tap.name] = hidden[rows, lengths - 1 if positions is None else positions[:, index]]
    return states


@dataclass(frozen=True)
class AttentionShape:
    """Of a decoder: attention layers, key/value heads and the size of one head."""

    layers: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> AttentionShape:
        """Read the shape from a config of any architecture; optimum knows what each calls its fields."""
        try:
            normalized = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
        except KeyError:  # optimum does not list every architecture (gemma2 and gemma3 are not): the usual names
            normalized = NormalizedTextConfigWithGQA(config)
        heads = normalized.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or normalized.hidden_size // heads
        return cls(normalized.num_layers, kv_heads, head_dim)


@dataclass(frozen=True)
class _Signature:
    """What a graph is traced with: sample inputs, which of their axes are dynamic, and the names of the contract."""

    inputs: dict[str, Any]
    axes: dict[str, Any]
    input_names: list[str]
    output_names: list[str]


def _signature(spec: Spec, config: PretrainedConfig, every_token: bool) -> _Signature:
    """Make the signature of a spec's graph; to be called where fake tensors are made."""
    batch, tokens, past = (torch.export.Dim(name) for name in ("batch", "tokens", "past"))
    inputs: dict[str, Any] = {"input_ids": torch.zeros(2, 5, dtype=torch.long), "lengths": torch.full((2,), 5)}
    axes: dict[str, Any] = {"input_ids": {0: batch, 1: tokens}, "lengths": {0: batch}}
    names, outputs = ["input_ids", "lengths"], ["rewards", *(["token_rewards"] if every_token else [])]
    if spec.causal:
        shape = AttentionShape.of(config)
        layers = range(shape.layers)
        # A tensor of its own for each: the exporter would wire one that stands for both to one of the two inputs.
        for name in ("past_keys", "past_values"):
            inputs[name] = [torch.zeros(2, shape.kv_heads, 3, shape.head_dim) for _ in layers]
        axes |= {name: [{0: batch, 2: past} for _ in layers] for name in ("past_keys", "past_values")}
        names += [f"past_{part}.{i}" for part in ("key", "value") for i in layers]
        outputs += [f"present_{part}.{i}" for i in layers for part in ("key", "value")]
    if spec.text.type_ids:
        inputs["token_type_ids"] = torch.zeros(2, 5, dtype=torch.long)
        axes["token_type_ids"] = {0: batch, 1: tokens}
        names.append("token_type_ids")
    if spec.has_positions:
        inputs["positions"] = torch.zeros(2, len(spec.taps), dtype=torch.long)
        axes["positions"] = {0: batch}
        names.append("positions")
    return _Signature(inputs, axes, names, outputs)


def trace(backbone: PreTrainedModel, head: RewardHead, *, every_token: bool = False) -> ir.Model:
    """Trace backbone and heads into one graph with dynamic batch, tokens and, of a decoder, past.

    The graph of a model that rewards steps has the output `token_rewards`; `every_token` asks for it of any decoder
    that reads one answer at one token.

    `backbone` comes from `meta_backbone(config, attention_name(...))`; both lose their meta tensors to fake ones. The
    initializers of the result are named `backbone.*` and `head.*` and have no data yet. Raises TraceError.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    spec = head.spec
    if every_token and (not spec.causal or len(spec.taps) > 1 or spec.taps[0].rule == "mean" or spec.input != "single"):
        raise TraceError(
            f"token rewards: the {spec.family} spec does not read one answer's reward at one token of a decoder; "
            "export it without"
        )
    every_token = every_token or spec.input == "steps"
    graph = (CausalGraph(backbone, head, every_token) if spec.causal else EncoderGraph(backbone, head)).eval()
    fill_with_fakes(graph, mode)
    with mode, _quiet():
        signature = _signature(spec, backbone.config, every_token)
        try:
            _compare_masks(graph, signature)
            program = torch.onnx.export(
                graph,
                kwargs=signature.inputs,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,  # lower.py does, once the weights are bound
                verbose=False,
                custom_translation_table={
                    torch.ops.rewardrt.attention.default: onnx_attention,
                    torch.ops.rewardrt.bidirectional_attention.default: onnx_bidirectional_attention,
                },
                dynamic_shapes=signature.axes,
                input_names=signature.input_names,
                output_names=signature.output_names,
            )
        except TraceError:
            raise
        except Exception as error:  # torch.export raises whatever the model's code raises
            cause = root_cause(error)
            if isinstance(cause, TraceError):
                raise cause from None
            raise TraceError(
                f"{_whose_attention(backbone)}; this backbone cannot be exported yet "
                f"({type(cause).__name__}: {first_line(cause)})"
            ) from error
    assert program is not None
    model: ir.Model = program.model
    _name_axes(model)
    return model


def _compare_masks(graph: nn.Module, signature: _Signature) -> None:
    """Run the backbone once with its masks watched; raises TraceError where one hides more or less than is computed."""
    backbone, tokens = graph.backbone, signature.inputs["input_ids"]
    assert isinstance(backbone, PreTrainedModel)
    if backbone.config._attn_implementation not in (ATTENTION, BIDIRECTIONAL):
        return  # its attention is its own code, traced as it is
    # With a mask of the padding transformers does not look for several texts in one row, by their positions.
    everything = torch.ones_like(tokens)
    _padding[:] = [_Padding(tokens.shape[1], signature.inputs["lengths"])]
    _prefix.past, _prefix.present = [], {}
    for key, value in zip(*(signature.inputs.get(name, []) for name in ("past_keys", "past_values")), strict=True):
        _prefix.past.append((key[:, :, :0], value[:, :, :0]))
    with watch_masks(backbone.config):
        backbone(input_ids=tokens, attention_mask=everything, **({"use_cache": False} if _prefix.past else {}))


def _name_axes(model: ir.Model) -> None:
    """Give every input and output the axis names of the bundle's contract."""
    names = {
        "input_ids": ("batch", "tokens"),
        "lengths": ("batch",),
        "rewards": ("batch", None),
        "token_rewards": ("batch", "tokens", None),
        "positions": ("batch", None),
        "token_type_ids": ("batch", "tokens"),
    }
    past, total = ("batch", None, "past", None), ("batch", None, "past + tokens", None)
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.name is not None and value.shape is not None
        kind = value.name.split(".")[0]
        axes = names.get(kind) or (past if kind.startswith("past") else total)
        value.shape = ir.Shape([axis or size for axis, size in zip(axes, value.shape, strict=True)])


def _whose_attention(backbone: PreTrainedModel) -> str:
    """Say of a backbone that could not be traced what about it is known to stand in the way."""
    name = type(backbone).__name__
    if not backbone._supports_attention_backend:
        return f"{name} computes attention in its own code, not through transformers' attention functions"
    return f"{name} could not be traced: its forward pass depends on values, or on a cache, that a graph has not"


def root_cause(error: BaseException) -> BaseException:
    """Return the exception at the bottom: the exporters wrap ours in several of their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporter's chatter about its own internals; our errors say what matters."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.onnx._internal.exporter")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
