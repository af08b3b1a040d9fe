"""The certificate: the exported bundle, scored through the public runtime, against the torch model.

The reference is transformers' own forward pass in float32 with eager attention, one text at a time, nothing padded.
Where the model does not fit in memory, a layer of it is there only while it runs, and fewer texts are scored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rewardrt import RewardModel
from rewardrt.bundle.manifest import GOLDEN, TOKENIZER, Certificate, Fidelity
from rewardrt.bundle.spec import Spec
from rewardrt.checks.verify import TOLERANCES, GoldenText, pair_order_agreement, read_golden, verify
from rewardrt.errors import CertificateError, InferenceError, RowError
from rewardrt.text.chat_template import ChatTemplate
from rewardrt.text.rendering import Pair, RawText, Renderer
from rewardrt.text.tokens import EncodedText, Tokenizer
from rewardrt_export.certificate.golden import MARGIN, MIN_TEXTS, Candidate, golden_texts, probe_texts
from rewardrt_export.certificate.published_class import rewards_of_class
from rewardrt_export.checkpoint import Checkpoint
from rewardrt_export.model.backbone import load, meta_backbone
from rewardrt_export.model.heads import RewardHead
from rewardrt_export.precisions.calibrate import LONGEST, Calibration
from rewardrt_export.precisions.table import PRECISIONS
from rewardrt_export.source.tokenizer import special_tokens
from rewardrt_export.tracing.attention_masks import named_lengths

PROBES_BY_LAYER = 4  # of a model that is read from disk for every text
LONGEST_PROBE = 6144  # tokens: what eager attention in torch has memory for
PROBE_WORK = 400_000_000_000  # parameters x tokens of a probe: some seconds of one processor
CGROUP = Path("/sys/fs/cgroup")  # a container sees its own limit here


@dataclass(frozen=True)
class GoldenSet:
    """The golden texts with torch's rewards: those that calibration and fidelity are about, and the probes."""

    own: tuple[GoldenText, ...] = ()
    probes: tuple[GoldenText, ...] = ()

    @property
    def every(self) -> tuple[GoldenText, ...]:
        """All texts that the bundle is certified on, as golden.jsonl holds them."""
        return self.own + self.probes

    @property
    def reward_std(self) -> float:
        """The standard deviation of the rewards of all but the probes."""
        return spread([text.rewards for text in self.own])


def score_golden(
    checkpoint: Checkpoint,
    bundle: Path,
    file: Path | None,
    calibration: Calibration | None = None,
    *,
    by_layer: bool = False,
) -> GoldenSet:
    """Tokenize the golden texts with what is in the bundle's folder, and score them with torch; probes apart.

    With `by_layer` they are MIN_TEXTS of the default set, from the first to the last, and a few probes. Raises
    CertificateError when transformers' own template or tokenizer gives something else for one of them.
    """
    candidates, encoded = encode_texts(checkpoint, bundle, file)
    if by_layer and file is None:
        chosen = np.linspace(0, len(candidates) - 1, MIN_TEXTS).round().astype(int)
        candidates, encoded = [candidates[index] for index in chosen], [encoded[index] for index in chosen]
    own = len(candidates)
    probes, encoded_probes = encode_probes(checkpoint, bundle, () if by_layer else certified_lengths(checkpoint))
    few = slice(None, PROBES_BY_LAYER if by_layer else None)
    candidates, encoded = candidates + probes[few], encoded + encoded_probes[few]
    # What calibration sees of the golden texts is every other one; the rest is left to be measured on.
    rewards = score_with_torch(
        checkpoint, encoded, calibration=calibration, observed=slice(None, own, 2), by_layer=by_layer
    )
    _compare_with_class(checkpoint, encoded, rewards)
    texts = [
        GoldenText(
            candidate.row,
            candidate.max_length,
            tuple(text.ids.tolist()),
            None if text.type_ids is None else tuple(text.type_ids.tolist()),
            text.truncated,
            tuple(text.positions.tolist()),
            found,
        )
        for candidate, text, found in zip(candidates, encoded, rewards, strict=True)
    ]
    return GoldenSet(tuple(texts[:own]), tuple(texts[own:]))


def _compare_with_class(
    checkpoint: Checkpoint, texts: Sequence[EncodedText], rewards: Sequence[tuple[float, ...]]
) -> None:
    """Raise CertificateError where transformers' own class gives other rewards than its backbone under our heads."""
    theirs = rewards_of_class(checkpoint, texts, available_memory())
    allowed = TOLERANCES["fp32"] * max(spread(rewards), 1e-3)
    for index, expected in theirs.items():
        if abs(rewards[index][0] - expected) > allowed:
            raise CertificateError(
                f"{checkpoint.source.architecture} of transformers gives {expected:g} for a golden text, and the "
                f"family {checkpoint.spec.family!r} gives {rewards[index][0]:g}; name another --family or --pooling"
            )


def encode_texts(checkpoint: Checkpoint, bundle: Path, file: Path | None) -> tuple[list[Candidate], list[EncodedText]]:
    """Read texts to score with torch from a file, or the default set, and tokenize them as the bundle will.

    Raises CertificateError.
    """
    renderer, tokenizer, template = _reader(checkpoint, bundle)
    candidates = golden_texts(renderer, tokenizer, checkpoint.spec, file)
    return candidates, [_encode(checkpoint, renderer, tokenizer, template, candidate) for candidate in candidates]


def encode_probes(
    checkpoint: Checkpoint, bundle: Path, lengths: Collection[int]
) -> tuple[list[Candidate], list[EncodedText]]:
    """Make the probes that this checkpoint needs, and tokenize them as the bundle will; raises CertificateError."""
    renderer, tokenizer, template = _reader(checkpoint, bundle)
    source, spec = checkpoint.source, checkpoint.spec
    assert source.trained is not None
    candidates = probe_texts(
        renderer,
        tokenizer,
        spec,
        special_tokens=special_tokens(source.trained.backend),
        named_tokens=sorted(set(spec.special_tokens.values())),
        variables=template.variables if template is not None and spec.text.source == "chat_template" else (),
        lengths=lengths,
    )
    return candidates, [_encode(checkpoint, renderer, tokenizer, template, candidate) for candidate in candidates]


def certified_lengths(checkpoint: Checkpoint) -> list[int]:
    """Return the lengths that config.json names and that a golden text can be longer than, in reasonable time."""
    sizes = [torch.Size(tensor.shape).numel() for tensor in checkpoint.source.stored.values()]
    most = min(checkpoint.spec.max_length, LONGEST_PROBE, PROBE_WORK // max(sum(sizes), 1))
    return sorted({length for length in named_lengths(checkpoint.source.config).values() if length + MARGIN <= most})


def uncertified_lengths(checkpoint: Checkpoint, longest: int) -> tuple[str, ...]:
    """Return the lengths that config.json names, within the model's limit, and that no golden text is longer than."""
    named = named_lengths(checkpoint.source.config).items()
    return tuple(f"{name} {length}" for name, length in named if longest <= length < checkpoint.spec.max_length)


def _reader(checkpoint: Checkpoint, bundle: Path) -> tuple[Renderer, Tokenizer, ChatTemplate | None]:
    """Return what makes token ids of rows in the bundle that is being written."""
    spec, source = checkpoint.spec, checkpoint.source.chat_template
    template = ChatTemplate(source, spec.special_tokens) if source else None
    renderer = Renderer(spec.text, template, with_prompt=spec.reads_prompt_end)
    return renderer, Tokenizer(bundle / TOKENIZER, spec), template


def spread(rewards: Sequence[tuple[float, ...]]) -> float:
    """Return the standard deviation of all rewards of several texts."""
    return float(np.array([reward for each in rewards for reward in each]).std())


def check_memory(checkpoint: Checkpoint, precisions: Sequence[str], *, calibrates: bool) -> bool:
    """Return whether the torch model in float32 fits in the memory that this machine has left.

    Raises CertificateError where a graph that is to be compared with it does not, or where calibration needs all of it.
    """
    sizes = [torch.Size(tensor.shape).numel() for tensor in checkpoint.source.stored.values()]
    parameters, free = sum(sizes), available_memory()
    if free is None:
        return True
    for name in precisions:
        needed = PRECISIONS[name].held * parameters
        if needed > free:
            raise CertificateError(
                f"onnxruntime needs {needed / 1e9:.1f} GB of memory for the {name} graph, and {free / 1e9:.1f} GB are "
                "free; export where there is more, in a smaller precision, or with --no-certify, which does not load it"
            )
    needed = 4 * parameters
    if needed > free and calibrates:
        raise CertificateError(
            f"torch needs {needed / 1e9:.1f} GB of memory for the model in float32 to calibrate on texts, and "
            f"{free / 1e9:.1f} GB are free; export where there is more, or without --calibrate"
        )
    return needed <= free


def available_memory() -> int | None:
    """Return the bytes that the machine, or this container's limit, has left; None where that is not known."""
    left = []
    if found := re.search(r"^MemAvailable:\s+(\d+) kB", _read_text(Path("/proc/meminfo")), re.MULTILINE):
        left.append(1024 * int(found[1]))
    limit, used = (_read_text(CGROUP / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        # Pages of files that were read long ago count as used, and are given back when memory is asked for.
        cached = re.search(r"^inactive_file (\d+)", _read_text(CGROUP / "memory.stat"), re.MULTILINE)
        left.append(int(limit) - int(used) + (int(cached[1]) if cached else 0))
    return min(left, default=None)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _encode(
    checkpoint: Checkpoint,
    renderer: Renderer,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    candidate: Candidate,
) -> EncodedText:
    item = candidate.item
    if template is not None and checkpoint.spec.text.source == "chat_template" and not isinstance(item, RawText):
        messages = list(renderer.messages(item))
        inputs = (item.first if isinstance(item, Pair) else item).inputs
        theirs = checkpoint.source.tokenizer.apply_chat_template(
            template.as_read(messages),
            chat_template=checkpoint.source.chat_template,
            tokenize=False,
            tools=list[Any](inputs.tools) if inputs.tools else None,
            documents=inputs.documents,
            **inputs.options,
        )
        if (ours := template.render(messages, inputs)) != theirs:
            raise CertificateError(f"the runtime's chat template gives {ours!r}, transformers' gives {theirs!r}")
    rendered = renderer.render(item)
    special = tokenizer.adds_special_tokens(rendered)
    assert checkpoint.source.trained is not None
    reference = checkpoint.source.trained.reference
    if rendered.pieces:
        expected = [token for piece in rendered.pieces for token in reference(piece, None, special)]
    else:
        expected = reference(rendered.text, rendered.pair, special)
    if tokenizer.encode_whole(rendered).tolist() != expected:
        raise CertificateError(
            f"the bundle's tokenizer gives other ids than the checkpoint's for {rendered.text[:80]!r}; this is a fault "
            "of the export: please report it"
        )
    try:
        return tokenizer.encode(rendered, max_length=candidate.max_length)
    except RowError as error:
        raise CertificateError(f"golden text {rendered.text[:80]!r}: {error}") from error


def score_with_torch(
    checkpoint: Checkpoint,
    texts: Sequence[EncodedText],
    *,
    dtype: torch.dtype = torch.float32,
    calibration: Calibration | None = None,
    observed: slice = slice(None),
    by_layer: bool = False,
) -> list[tuple[float, ...]]:
    """Return the raw rewards of each text: one, one for each of its steps, or the vector that it is compared by.

    The backbone computes in `dtype`, the head in float32. `calibration` takes in the input of each linear layer for the
    texts of the slice `observed`, and its gradient for those that are not too long. The torch model is in memory only
    while this runs; with `by_layer`, and no calibration, one of its layers at a time.
    """
    model = meta_backbone(checkpoint.source.config, "eager")
    load(model, checkpoint.backbone.sources, dtype, by_layer=by_layer)
    watching = _Watch(model, calibration) if calibration is not None else None
    seen = set(range(len(texts))[observed])
    head = checkpoint.head()
    head.load_state_dict({name: read() for name, read in head.sources.items()}, strict=True, assign=True)
    head.requires_grad_(False)
    rewards = []
    for index, text in enumerate(texts):
        score = partial(_score_text, model, head, checkpoint.spec, text)
        if watching is not None and index in seen:
            values = watching.score(score, derive=len(text.ids) <= LONGEST)
        else:
            try:
                with torch.inference_mode():
                    values = score()
            except (RuntimeError, NotImplementedError) as error:  # weights on the meta device: they are not there
                if not by_layer:
                    raise
                raise CertificateError(
                    f"{checkpoint.source.architecture} cannot be computed layer by layer "
                    f"({str(error).splitlines()[0]}); export where there is more memory, or with --no-certify"
                ) from error
        rewards.append(tuple(values.tolist()))
    return rewards


def _score_text(model: PreTrainedModel, head: RewardHead, spec: Spec, text: EncodedText) -> torch.Tensor:
    inputs = {"input_ids": text.ids} | ({} if text.type_ids is None else {"token_type_ids": text.type_ids})
    batch: dict[str, Any] = {name: torch.from_numpy(ids).unsqueeze(0) for name, ids in inputs.items()}
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


class _Watch:
    """Hands the inputs of linear layers to a calibration, while the texts that it is to see are scored."""

    def __init__(self, model: PreTrainedModel, calibration: Calibration) -> None:
        self._calibration = calibration
        self._on = False
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(self._start)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | Conv1D):
                module.register_forward_pre_hook(partial(self._see, name))
                calibration.watch(name, module.weight, transposed=isinstance(module, Conv1D))

    def score(self, score: Callable[[], torch.Tensor], *, derive: bool) -> torch.Tensor:
        """Score a text and, to `derive`, go back from its reward (or the sum of them) to the inputs of all layers."""
        self._on = True
        with torch.set_grad_enabled(derive):
            values = score()
        if derive:
            values.sum().backward()
            self._calibration.texts += 1
        self._on = False
        return values.detach()

    def _start(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], embedding: torch.Tensor) -> None:
        if self._on and torch.is_grad_enabled():
            embedding.requires_grad_(True)  # where the way back ends

    def _see(self, name: str, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
        return (self._calibration.observe(name, inputs[0]), *inputs[1:]) if self._on else None


def measure_fidelity(
    checkpoint: Checkpoint,
    bundle: Path,
    precision: str,
    golden: Sequence[GoldenText],
    unseen: slice,
    *,
    by_layer: bool = False,
) -> Fidelity:
    """Compare a graph that rounds, and torch in bfloat16, with torch in float32 on the golden texts of a slice."""
    texts = [text.encoded for text in golden[unseen]]
    model = RewardModel.load(bundle, provider="cpu", precision=precision, check_hashes=False)
    expected = np.array([reward for text in golden[unseen] for reward in text.rewards], dtype=np.float64)
    found = []
    for text, values in zip(golden[unseen], model.score_encoded(texts), strict=True):
        if isinstance(values, InferenceError):
            raise CertificateError(f"{precision}: {values}")
        found += values[: len(text.rewards)].tolist()  # objectives come after the reward, and torch gave none
    rounded = np.array(found)
    del model  # two of them need not fit
    other = score_with_torch(checkpoint, texts, dtype=torch.bfloat16, by_layer=by_layer)
    bfloat16 = np.array([value for each in other for value in each])
    std = spread([text.rewards for text in golden])
    return Fidelity(
        texts=len(texts),
        rms_std=float(np.sqrt(np.mean((rounded - expected) ** 2))) / std,
        pair_order_agreement=pair_order_agreement(rounded, expected),
        bf16_rms_std=float(np.sqrt(np.mean((bfloat16 - expected) ** 2))) / std,
        bf16_pair_order_agreement=pair_order_agreement(bfloat16, expected),
    )


def certify(
    checkpoint: Checkpoint,
    bundle: Path,
    precision: str,
    fidelity: Fidelity | None = None,
    *,
    by_layer: bool = False,
) -> Certificate:
    """Score the golden texts through the public runtime with one of the graphs, and say how far off torch it is.

    Raises CertificateError when that is over the precision's tolerance, or not a number.
    """
    found = verify(RewardModel.load(bundle, provider="cpu", precision=precision, check_hashes=False))
    if found.problems:
        raise CertificateError(
            f"the exported bundle failed its certificate, so none was written: {precision}: {'; '.join(found.problems)}"
        )
    longest = max(len(text.ids) for text in read_golden(bundle / GOLDEN))
    return Certificate(
        precision=found.precision,
        reference=f"torch {torch.__version__}, transformers {transformers.__version__}, float32, eager attention"
        + (", layer by layer" if by_layer else ""),
        texts=found.texts,
        reward_std=found.reward_std,
        tolerance_std=found.tolerance_std,
        single=found.single,
        batched=found.batched,
        pair_order_agreement=found.pair_order_agreement,
        provider=found.provider,
        fidelity=fidelity,
        longest=longest,
        beyond=uncertified_lengths(checkpoint, longest),
    )
