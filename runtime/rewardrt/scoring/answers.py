"""From rows to texts, and from the values of texts back to rows.

    rows -> prepare: read (rows, pairwise), flattened, rendered and tokenized -> texts
    values of the texts -> finish: normalised, aggregated -> a score of each text
    scores of the texts -> regroup: settled (pairwise) -> a result for each row

This module knows the model's spec, tokenizer and chat template, and no graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from rewardrt.bundle.manifest import CHAT_TEMPLATE, TOKENIZER, Bundle
from rewardrt.bundle.spec import AGGREGATE_RULES, Affine, AggregateRule
from rewardrt.errors import BundleError, InferenceError, RewardRTError, RowError
from rewardrt.scoring.pairwise import plan, settle
from rewardrt.scoring.scored import Scored, ScoredAnswers, ScoredPair, ScoredRow
from rewardrt.text.chat_template import ChatTemplate
from rewardrt.text.items import Input, TokenIds, check_string
from rewardrt.text.rendering import READS_NO_INSTRUCTION, RenderedText, Renderer
from rewardrt.text.rows import Row, parse_row
from rewardrt.text.tokens import EncodedText, Tokenizer

Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prepared:
    """Rows that were read, and the texts of all rows in order.

    An error takes the place of a row or text that failed.
    """

    rows: tuple[Row | RewardRTError, ...]
    texts: tuple[EncodedText | RewardRTError, ...]


class Answers:
    """The part of a model that needs no graph: which texts a row has, and how their values become its result."""

    def __init__(self, bundle: Bundle) -> None:
        """Read the tokenizer and the chat template. Raises BundleError."""
        self.spec = bundle.manifest.spec
        self.tokenizer = Tokenizer(bundle.file(TOKENIZER), self.spec)
        self._template = _read_template(bundle)
        self.renderer = Renderer(self.spec.text, self._template, with_prompt=self.spec.reads_prompt_end)
        self.uses_date = self._template is not None and self._template.uses_date

    def use_instruction(self, instruction: str) -> None:
        """Use this instruction for rows that have none. Raises RowError if the model reads no instruction."""
        if not self.spec.text.takes_instruction:
            raise RowError(READS_NO_INSTRUCTION)
        rule = replace(self.spec.text, instruction=check_string(instruction, "instruction"))
        self.renderer = Renderer(rule, self._template, with_prompt=self.spec.reads_prompt_end)

    def parse(self, row: object) -> Row:
        """Return the texts that this model scores for a row, or raise RowError."""
        return plan(parse_row(row), self.spec)

    def prepare(self, rows: Iterable[object], *, max_length: int | None = None) -> Prepared:
        """Read rows and tokenize all their texts; a row or text that fails has its error in its place.

        `rows` may contain errors, which are kept. `max_length` lowers the model's limit in tokens for these rows.
        """
        read = read_rows(rows, self.parse)
        return Prepared(tuple(read), tuple(self.encode(flatten(read), max_length=max_length)))

    def encode(self, items: Sequence[Input], *, max_length: int | None = None) -> list[EncodedText | RewardRTError]:
        """Render and tokenize items; an item that fails has its error in its place."""
        results: dict[int, EncodedText | RewardRTError] = {}
        rendered: dict[int, RenderedText] = {}
        for index, item in enumerate(items):
            try:
                if isinstance(item, TokenIds):
                    results[index] = self.tokenizer.encode_ids(item.ids, max_length=max_length)
                else:
                    rendered[index] = self.renderer.render(item)
            except RowError as error:
                results[index] = error
        encoded = self.tokenizer.encode_many(list(rendered.values()), max_length=max_length)
        results |= dict(zip(rendered, encoded, strict=True))
        return [results[index] for index in range(len(items))]

    def pieces(self, item: Input) -> list[str]:
        """Split an item's text into one piece per token, for display; [] for items that are not one text."""
        if isinstance(item, TokenIds):
            return []
        rendered = self.renderer.render(item)
        return [] if rendered.pair is not None or rendered.pieces else self.tokenizer.pieces(rendered)

    def check_options(self, *, normalize: bool | None = None, aggregate: AggregateRule | None = None) -> None:
        """Raise RewardRTError for options that this model does not support."""
        self._normalisation(normalize)
        if aggregate is not None and self.spec.input != "steps":
            raise RewardRTError(f"aggregate {aggregate!r}: this model gives one reward to a text, there are no steps")
        if aggregate not in (None, *AGGREGATE_RULES):
            raise RewardRTError(f"aggregate {aggregate!r}: expected one of {', '.join(AGGREGATE_RULES)}")

    def finish(
        self,
        text: EncodedText,
        values: Values | InferenceError,
        *,
        normalize: bool | None = None,
        aggregate: AggregateRule | None = None,
    ) -> Scored | InferenceError:
        """Return the score of a text, given its raw values from the runner."""
        values = self.normalised(values, normalize=normalize, rewards=None if self.spec.input == "steps" else 1)
        if isinstance(values, InferenceError):
            return values
        numbers = values.tolist()
        if self.spec.input != "steps":
            return Scored(numbers[0], len(text.ids), text.truncated, tuple(numbers[1:]))
        reward = float("nan") if aggregate is None else _AGGREGATES[aggregate](values.astype(np.float64))
        return Scored(float(np.float32(reward)), len(text.ids), text.truncated, steps=tuple(numbers))

    def normalised(
        self, values: Values | InferenceError, *, normalize: bool | None = None, rewards: int | None = None
    ) -> Values | InferenceError:
        """Return the values, with the first `rewards` of them (None: all) normalised if that is wanted.

        The formula is (r - mean) / (std + eps), in float64, with the spec's `Affine`. `normalize` overrides the
        bundle's default.
        """
        affine = self._normalisation(normalize)
        if affine is None or isinstance(values, InferenceError):
            return values
        raw = values[:rewards].astype(np.float64)
        normal = ((raw - affine.mean) / (affine.std + affine.eps)).astype(np.float32)
        if not np.isfinite(normal).all():
            return InferenceError(f"the normalised reward is {normal.tolist()}; expected finite numbers")
        return np.concatenate([normal, values[len(normal) :]])

    def _normalisation(self, normalize: bool | None) -> Affine | None:
        if not (self.spec.normalise_by_default if normalize is None else normalize):
            return None
        if self.spec.normalise is None:
            raise RewardRTError("normalize: the bundle has no mean and std; `rewardrt normalize` measures them")
        return self.spec.normalise


def read_rows(rows: Iterable[object], parse: Callable[[object], Row] = parse_row) -> list[Row | RewardRTError]:
    """Return each row parsed, or the error that it gives; errors among the rows are kept."""
    found: list[Row | RewardRTError] = []
    for row in rows:
        try:
            found.append(row if isinstance(row, RewardRTError) else parse(row))
        except RowError as error:
            found.append(error)
    return found


def flatten(rows: Iterable[Row | RewardRTError]) -> list[Input]:
    """Return the items of all rows in order; errors have no items."""
    return [item for row in rows if isinstance(row, Row) for item in row.items]


def regroup(
    rows: Iterable[Row | RewardRTError], results: Iterable[Scored | RewardRTError]
) -> list[ScoredRow | RewardRTError]:
    """Return the result of each row, from the results of the items that `flatten` gave for the rows.

    If any text of a row failed, the row's result is one error, which names the fault of each failed text.
    """
    left = iter(results)
    return [row if isinstance(row, RewardRTError) else _settled(row, [next(left) for _ in row.items]) for row in rows]


def _settled(row: Row, results: Sequence[Scored | RewardRTError]) -> ScoredRow | RewardRTError:
    failed = {index: result for index, result in enumerate(results) if isinstance(result, RewardRTError)}
    if failed:
        first = next(iter(failed.values()))
        if row.kind == "single":
            return first
        kind = InferenceError if isinstance(first, InferenceError) else RowError
        return kind("; ".join(f"{row.label(index)}{error}" for index, error in failed.items()))
    scores = settle(row, [result for result in results if isinstance(result, Scored)])
    if row.kind == "single":
        return scores[0]
    return ScoredPair(*scores) if row.kind == "pair" else ScoredAnswers(tuple(scores))


_AGGREGATES: dict[AggregateRule, Callable[[npt.NDArray[np.float64]], float]] = {
    "min": lambda steps: float(steps.min()),
    "product": lambda steps: float(steps.prod()),
    "last": lambda steps: float(steps[-1]),
    "mean": lambda steps: float(steps.mean()),
}


def _read_template(bundle: Bundle) -> ChatTemplate | None:
    if bundle.manifest.spec.text.source != "chat_template":
        return None
    path = bundle.file(CHAT_TEMPLATE)
    try:
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path}: expected UTF-8 ({error.reason}); mend the template and export again") from error
    spec = bundle.manifest.spec
    return ChatTemplate(source, spec.special_tokens, generation_prompt=spec.text.generation_prompt)
