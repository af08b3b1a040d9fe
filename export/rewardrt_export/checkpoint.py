"""A trained reward model on disk: its spec, and what every tensor is used for.

After this step no weights are in memory; only the heads' values have been checked.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rewardrt.bundle.spec import Combine, PoolingRule, Spec, Tap, TextRule, from_json
from rewardrt.errors import BundleError, CheckpointError
from rewardrt_export.families import Draft, choose_family, matching_families
from rewardrt_export.families.objectives import label_names
from rewardrt_export.families.token_logit import TOKEN_LOGIT
from rewardrt_export.model.backbone import Binding, bind, first_position, meta_backbone
from rewardrt_export.model.heads import RewardHead
from rewardrt_export.model.length_limits import length_limit
from rewardrt_export.source.folder import Source, read_source
from rewardrt_export.source.tokenizer import TokenizerChoice
from rewardrt_export.source.weights import StoredTensor, shorten
from rewardrt_export.token_options import TokenOptions

# Larger limits mean "no limit"; tokenizers use a number like 1e30.
UNLIMITED = 10_000_000


@dataclass(frozen=True)
class Checkpoint:
    """What the rest of the export needs to know about a checkpoint."""

    source: Source
    spec: Spec
    backbone: Binding

    def head(self) -> RewardHead:
        """Return the heads on the meta device."""
        return RewardHead(self.spec, self.source.stored, self.source.width)


def read_checkpoint(
    folder: Path,
    *,
    base: Path | None = None,
    family: str | None = None,
    spec_file: Path | None = None,
    pooling: PoolingRule | None = None,
    pad_token: str | None = None,
    chat_template: str | None = None,
    max_length: int | None = None,
    weights: Sequence[float] = (),
    normalise: bool = False,
    tokenizer: TokenizerChoice | None = None,
    token_options: TokenOptions | None = None,
) -> Checkpoint:
    """Read a checkpoint of any known family, or of the kind that `spec_file` describes; options override both.

    `base` is the folder of the base model: an adapter's, if adapter_config.json does not name one, or the one with the
    files that a checkpoint lacks. `pad_token` is the token, or its id, that training padded with. `chat_template` is
    the name of one of several templates, or a file. `token_options` say how logits of tokens are read. Choices made
    where the files are ambiguous are in the source's `choices`.

    Raises CheckpointError naming the file or the tensors if something is missing, left over or of a wrong shape.
    """
    source = read_source(folder, base, pad_token=pad_token, chat_template=chat_template, tokenizer=tokenizer)
    if pooling == "last_mask":
        source = dataclasses.replace(source, padding=dataclasses.replace(source.padding, unread=True))
    name, draft = describe(source, family=family, spec_file=spec_file, options=token_options)
    if pooling is not None:
        draft = dataclasses.replace(draft, taps=(_pooling_tap(pooling, source), *draft.taps[1:]))
    if pad_token is not None and "pad_token" not in source.choices:
        raise CheckpointError(f"--pad-token {pad_token}: the reward is not read by a pad token; leave the option out")
    if weights:
        draft = _weigh(draft, tuple(weights), source)
    if normalise and draft.normalise is None:
        raise CheckpointError("--normalize: config.json has no mean and std to normalise with")
    try:
        spec = Spec(
            family=name,
            backbone=source.config.model_type,
            causal=draft.causal,
            heads=draft.heads,
            max_length=_choose_max_length(source, max_length or draft.max_length, _positions(source)),
            special_tokens={
                name: token for name, token in source.tokenizer.special_tokens_map.items() if isinstance(token, str)
            },
            input=draft.input,
            text=_run_time_state(draft.text, source),
            taps=draft.taps,
            combine=draft.combine,
            output=draft.output,
            normalise=draft.normalise,
            normalise_by_default=normalise,
            vocabulary=source.config.vocab_size,
            padded=draft.padded,
        )
    except BundleError as error:
        raise CheckpointError(f"the spec of {folder}: {error}") from error
    _name_tokens_without_a_row(source, source.config.vocab_size)
    checkpoint = Checkpoint(source, spec, Binding({}, {}))
    head_tensors = checkpoint.head().tensors
    return dataclasses.replace(checkpoint, backbone=_bind_backbone(source, draft, head_tensors))


def _run_time_state(rule: TextRule, source: Source) -> TextRule:
    """Add settings of the tokenizer that tokenizer.json cannot store."""
    split = bool(source.tokenizer.split_special_tokens)
    return dataclasses.replace(rule, split_special_tokens=rule.split_special_tokens or split)


def _name_tokens_without_a_row(source: Source, rows: int) -> None:
    """Note the tokens without a row in the embedding; a text that contains one is refused when it is scored."""
    beyond = sorted((number, token) for token, number in source.tokenizer.get_vocab().items() if number >= rows)
    if beyond:
        number, token = beyond[0]
        source.choices["vocabulary"] = (
            f"{len(beyond)} tokens of the tokenizer have no row in the embedding of {rows}: {token!r} (id {number})"
            + (" and others" if len(beyond) > 1 else "")
            + "; a text that holds one is refused"
        )


def _weigh(draft: Draft, weights: tuple[float, ...], source: Source) -> Draft:
    """Make the reward the weighted sum of the head's outputs, as given by --weights."""
    if draft.combine.rule not in ("none", "dot"):
        raise CheckpointError(
            f"--weights: the checkpoint's own {draft.combine.rule} makes one reward of its values; leave the option out"
        )
    if not all(map(math.isfinite, weights)):
        raise CheckpointError(f"--weights {', '.join(map(str, weights))}: expected finite numbers")
    labels = draft.output.labels or (label_names(source.raw, len(weights)) if len(weights) > 1 else ())
    output = dataclasses.replace(draft.output, labels=labels)
    return dataclasses.replace(draft, combine=Combine("dot", weights), output=output)


def describe(
    source: Source,
    *,
    family: str | None = None,
    spec_file: Path | None = None,
    options: TokenOptions | None = None,
) -> tuple[str, Draft]:
    """Return the family's name and its draft, from the checkpoint's files or from a --spec file.

    `options` say how logits of tokens are read; --tokens without --family selects the family `token-logit`.
    """
    given = options.given if options is not None else []
    if spec_file is None:
        said = "--family"
        if family is None and options is not None and options.tokens:
            family, said = TOKEN_LOGIT.name, "--tokens"
        chosen = choose_family(source, family)
        if family is not None:
            source.choices["family"] = f"{chosen.name}, as {said} says; {_fitting(source)}"
        if options is None or not given:
            return chosen.name, chosen.describe(source)
        if chosen.with_options is None:
            raise CheckpointError(
                f"{given[0]}: the {chosen.name} family reads no logits of tokens; leave the option out"
            )
        return chosen.name, chosen.with_options(source, options)
    if given:
        raise CheckpointError(f"{given[0]}: --spec says what the model is; write it there")
    try:
        data = tomllib.loads(spec_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{spec_file}: not readable as TOML ({error})") from error
    try:
        return spec_file.stem, from_json(Draft, data, str(spec_file), complete=False)
    except BundleError as error:
        raise CheckpointError(str(error)) from error


def _fitting(source: Source) -> str:
    fitting = matching_families(source)
    return f"the files fit {' and '.join(fitting)}" if fitting else "the files name none"


def _bind_backbone(source: Source, draft: Draft, head_tensors: set[str]) -> Binding:
    # Any attention implementation will do: only names and shapes are needed.
    model = meta_backbone(source.config, "eager")
    # Tied embeddings belong to the backbone and to a language model's head, so the head's tensors are included.
    binding = bind(model, rename_backbone(source.stored, draft, model.base_model_prefix))
    meant = source.unused.keys() | draft.unused.keys() | head_tensors
    names = sorted({tensor.name for tensor in binding.unused.values()} - meant)
    if names:
        raise CheckpointError(
            f"{len(names)} tensors are left over, neither {source.architecture}'s backbone nor its head "
            f"({', '.join(sorted(head_tensors))}): {shorten(names)}; a reward would ignore them"
        )
    return binding


def rename_backbone(stored: dict[str, StoredTensor], draft: Draft, wanted: str) -> dict[str, StoredTensor]:
    """Replace the draft's prefix of the backbone's tensors, if it has one, by transformers' prefix `wanted`."""
    prefix = draft.backbone_prefix
    if not prefix:
        return stored
    return {
        f"{wanted}.{name.removeprefix(prefix)}" if name.startswith(prefix) else name: tensor
        for name, tensor in stored.items()
    }


def _pooling_tap(rule: PoolingRule, source: Source) -> Tap:
    """Return the tap for --pooling; the id that it looks for is the pad id, or else the tokenizer's."""
    if rule == "last_mask":
        return Tap("last", rule)
    pad = source.choose_pad_id(required=True)
    if pad is None:
        raise CheckpointError(
            f"--pooling {rule}: neither config.json nor the tokenizer has a pad token; name it with --pad-token"
        )
    return Tap("last", rule, (pad,))


def _positions(source: Source) -> int | None:
    """Return the number of tokens that the backbone has positions for, or None if it has no limit.

    Positions before the first token's, as in RoBERTa, are not counted.
    """
    total: int | None = getattr(source.config, "max_position_embeddings", None)
    if total is not None and (isinstance(total, bool) or not isinstance(total, int)):
        raise CheckpointError(f"config.json: max_position_embeddings {total!r}; expected a number of tokens")
    if total is None or total == -1:  # XLNet's value for "no limit"
        return None
    return total - first_position(meta_backbone(source.config, "eager"))


def _choose_max_length(source: Source, wanted: int | None, positions: int | None) -> int:
    """Return the limit in tokens: the requested one, or the smaller of the tokenizer's and the positions'.

    If the backbone computes longer texts differently, texts are limited to the length before that, which is noted in
    `choices`.
    """
    if (limit := length_limit(source.config)) is not None:
        if wanted is not None and wanted > limit.tokens:
            raise CheckpointError(
                f"--max-length {wanted}: the graph is exact for texts of {limit.tokens} tokens; {limit.beyond}"
            )
        if wanted is None and (positions is None or positions > limit.tokens):
            source.choices["max_length"] = f"{limit.tokens} tokens; {limit.beyond}"
            positions = limit.tokens
    limits = [limit for limit in (positions, source.tokenizer.model_max_length) if limit and limit < UNLIMITED]
    if wanted is None:
        if not limits:
            raise CheckpointError(
                "neither config.json nor the tokenizer says how long a text may be; give --max-length"
            )
        return int(min(limits))
    if wanted < 1:
        raise CheckpointError(f"--max-length {wanted}: expected at least 1")
    # A DeBERTa with only relative positions has a bucket for every distance, so it has no limit.
    if positions and wanted > positions and getattr(source.config, "position_biased_input", True):
        raise CheckpointError(f"--max-length {wanted}: the backbone has positions for {positions} tokens")
    return wanted
