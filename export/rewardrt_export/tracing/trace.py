"""Trace one forward pass into a graph; a decoder's takes a shared prefix as input and returns it as output.

The backbone is transformers' own code, unchanged, with its attention replaced (`attention`). A pass before the trace
determines from each layer's mask which tokens it may look at (`attention_masks`). Tracing runs on fake tensors: no
weights are read.
"""

from __future__ import annotations

import contextlib
import logging
import os
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from rewardrt.errors import TraceError
from rewardrt_export.model.backbone import fill_with_fakes
from rewardrt_export.model.heads import RewardHead
from rewardrt_export.source.weights import first_line
from rewardrt_export.tracing.attention import ATTENTION, BIDIRECTIONAL, TRANSLATIONS, prefix
from rewardrt_export.tracing.attention_masks import watch_masks
from rewardrt_export.tracing.bidirectional import padding_masks
from rewardrt_export.tracing.complex_numbers import complex_as_real
from rewardrt_export.tracing.experts import EXPERT_TRANSLATIONS
from rewardrt_export.tracing.graphs import CausalGraph, WholeTextGraph
from rewardrt_export.tracing.signature import AttentionShape, PastShape, Signature, name_axes, signature_of
from rewardrt_export.tracing.state_layers import STATE_TRANSLATIONS, has_state, layer_states, state_functions

# Exceptions that torch raises if code depends on a tensor's values, which do not exist during a trace.
_BY_VALUE = ("DataDependentOutputException", "DynamicOutputShapeException", "GuardOnDataDependentSymNode")
OPSET = 23  # the first with Attention, RotaryEmbedding and RMSNormalization


def trace(backbone: PreTrainedModel, head: RewardHead, *, every_token: bool = False) -> ir.Model:
    """Trace backbone and heads into one graph with dynamic batch, tokens and, for a decoder, past.

    The graph of a model that rewards steps has the output `token_rewards`. `every_token` adds it for any decoder that
    reads one answer at one token.

    `backbone` comes from `meta_backbone(config, attention_name(...))`; the meta tensors of both modules are replaced by
    fakes. The result's initializers are named `backbone.*` and `head.*`, and have no data yet. Raises TraceError.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    spec = head.spec
    if every_token and (not spec.causal or len(spec.taps) > 1 or spec.taps[0].rule == "mean" or spec.input != "single"):
        raise TraceError(
            f"token rewards: the {spec.family} spec does not read one answer's reward at one token of a decoder; "
            "export it without"
        )
    every_token = every_token or spec.input == "steps"
    hooked = backbone.config._attn_implementation == ATTENTION
    takes_past = hooked or (has_state(backbone) and not hasattr(backbone.config, "num_attention_heads"))
    graph = (CausalGraph if takes_past else WholeTextGraph)(backbone, head, every_token).eval()
    fill_with_fakes(graph, mode)
    with mode, complex_as_real(), state_functions(backbone), _quiet():
        try:
            signature = signature_of(spec, _look_through(graph), every_token)
            program = torch.onnx.export(
                _capture(graph, signature),
                dynamo=True,
                opset_version=OPSET,
                optimize=False,  # lower.py optimizes, after the weights are bound
                verbose=False,
                custom_translation_table=TRANSLATIONS | EXPERT_TRANSLATIONS | STATE_TRANSLATIONS,
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
                f"{_say_cause(backbone, cause)}; this backbone cannot be exported yet "
                f"({type(cause).__name__}: {first_line(cause)})"
            ) from error
    assert program is not None
    model: ir.Model = program.model
    name_axes(model)
    return model


def _capture(graph: CausalGraph | WholeTextGraph, signature: Signature) -> torch.export.ExportedProgram:
    """Capture the pass for every batch size and every length. Raises TraceError if the code only allows one.

    This is not left to the ONNX exporter: if the code only allows one length, the exporter captures a graph for that
    length, and the error would appear when a text of another length is scored.
    """
    with torch.fx.experimental._config.patch(  # type: ignore[attr-defined]
        backed_size_oblivious=True  # an axis may have size 0 or 1
    ):
        try:
            return torch.export.export(
                graph,
                (),
                signature.inputs,
                dynamic_shapes=signature.axes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,  # about memory layouts, which do not matter in ONNX
            )
        except torch._dynamo.exc.UserError as error:
            if error.error_type is not torch._dynamo.exc.UserErrorType.CONSTRAINT_VIOLATION:
                raise
            raise TraceError(
                f"{type(graph.backbone).__name__} computes in another way for another number of tokens, as in a "
                "loop over them in its own code, and one graph has to serve texts of every length; this backbone "
                "cannot be exported yet"
            ) from error


def _look_through(graph: CausalGraph | WholeTextGraph) -> PastShape:
    """Run the backbone once while its masks are recorded; return what each layer of a decoder keeps of a text.

    Raises TraceError for a mask that is not supported.
    """
    backbone = graph.backbone
    if backbone.config._attn_implementation not in (ATTENTION, BIDIRECTIONAL) and not isinstance(graph, CausalGraph):
        return PastShape()  # its attention is its own code, traced as it is
    tokens, lengths = torch.zeros(2, 5, dtype=torch.long), torch.full((2,), 5)
    causal = graph.head.spec.causal
    padding_masks.begin(tokens.shape[1], lengths)
    prefix.begin(None)
    layer_states.begin(None)
    prefix.reaches, padding_masks.reaches = [], []
    with watch_masks(backbone.config), _watch_convolutions(backbone, isinstance(graph, CausalGraph)):
        # Given a padding mask, transformers does not look for several texts packed into one row.
        backbone(input_ids=tokens, attention_mask=torch.ones_like(tokens), **({"use_cache": False} if causal else {}))
    if not isinstance(graph, CausalGraph):
        return PastShape()
    if not prefix.present and not layer_states.present:
        raise TraceError(
            f"{type(backbone).__name__} computes attention in its own code, not through transformers' attention "
            "functions; this backbone cannot be exported yet"
        )
    kept = (prefix.present[layer] for layer in range(len(prefix.present)))
    layers = [AttentionShape(key.shape[1], key.shape[3], value.shape[3]) for key, value in kept]
    return PastShape(layers, [tuple(state.shape[1:]) for state in layer_states.present])


@contextlib.contextmanager
def _watch_convolutions(backbone: PreTrainedModel, takes_past: bool) -> Iterator[None]:
    """If the graph takes a past, refuse convolutions over tokens outside of the functions that keep a state.

    Such a convolution would start anew after a prefix.
    """

    def refuse(module: Any, inputs: object) -> None:
        raise TraceError(
            f"{type(backbone).__name__} has convolutions over the tokens in its own code ({type(module).__name__} of "
            f"{module.kernel_size[0]}), whose state after a prefix is not kept; this backbone cannot be exported yet"
        )

    convolutions = [
        module
        for module in backbone.modules()
        if takes_past and isinstance(module, torch.nn.Conv1d) and module.kernel_size[0] > 1
    ]
    hooks = [module.register_forward_pre_hook(refuse) for module in convolutions]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _say_cause(backbone: PreTrainedModel, cause: BaseException) -> str:
    """Say which line of a backbone's code prevented the trace, and why."""
    name = type(backbone).__name__
    frames = traceback.extract_tb(cause.__traceback__)
    own = [frame for frame in frames if "transformers/models/" in frame.filename.replace(os.sep, "/")]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno}: `{own[-1].line}`)" if own else ""
    if type(cause).__name__ in _BY_VALUE:
        return f"{name} goes on in another way for other values{where}, and a graph computes the same for all"
    return f"{name} could not be traced{where}"


def root_cause(error: BaseException) -> BaseException:
    """Return the innermost exception: the exporters wrap ours in several of their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's messages about its internals; our own errors are enough."""
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
