"""The graph: one traced forward pass, a decoder's with a shared prefix going in and coming out.

The backbone is transformers' own code, untouched, with its attention replaced by ours (`attention`). A pass before the
trace compares what each layer's mask would have hidden with what its attention is told (`attention_masks`). Tracing
runs on fake tensors: no weight is read.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from rewardrt.errors import TraceError
from rewardrt_export.model.backbone import fill_with_fakes
from rewardrt_export.model.heads import RewardHead
from rewardrt_export.source.weights import first_line
from rewardrt_export.tracing.attention import ATTENTION, BIDIRECTIONAL, TRANSLATIONS, padding_masks, prefix
from rewardrt_export.tracing.attention_masks import watch_masks
from rewardrt_export.tracing.graphs import CausalGraph, EncoderGraph
from rewardrt_export.tracing.signature import Signature, name_axes, signature_of

OPSET = 23  # the first with Attention, RotaryEmbedding and RMSNormalization


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
        signature = signature_of(spec, backbone.config, every_token)
        try:
            _compare_masks(graph, signature)
            program = torch.onnx.export(
                graph,
                kwargs=signature.inputs,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,  # lower.py does, once the weights are bound
                verbose=False,
                custom_translation_table=TRANSLATIONS,
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
    name_axes(model)
    return model


def _compare_masks(graph: nn.Module, signature: Signature) -> None:
    """Run the backbone once with its masks watched; raises TraceError where one hides more or less than is computed."""
    backbone, tokens = graph.backbone, signature.inputs["input_ids"]
    assert isinstance(backbone, PreTrainedModel)
    if backbone.config._attn_implementation not in (ATTENTION, BIDIRECTIONAL):
        return  # its attention is its own code, traced as it is
    # With a mask of the padding transformers does not look for several texts in one row, by their positions.
    everything = torch.ones_like(tokens)
    padding_masks.begin(tokens.shape[1], signature.inputs["lengths"])
    layers = zip(*(signature.inputs.get(name, []) for name in ("past_keys", "past_values")), strict=True)
    prefix.begin([(key[:, :, :0], value[:, :, :0]) for key, value in layers])
    with watch_masks(backbone.config):
        backbone(input_ids=tokens, attention_mask=everything, **({"use_cache": False} if prefix.past else {}))


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
