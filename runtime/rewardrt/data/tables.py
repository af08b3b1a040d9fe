"""Scored rows of files with columns: the input's own columns unchanged, then the rewards as float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rewardrt.bundle.spec import Spec
from rewardrt.data.columns import column_of, pack_table, rows_of
from rewardrt.data.compression import import_pyarrow
from rewardrt.data.files import Summary
from rewardrt.data.lines import Line
from rewardrt.data.selection import Kept, Selection
from rewardrt.errors import RewardRTError
from rewardrt.scoring.scored import ScoredRow


class TableEncoder:
    """Encodes scored rows as packed pyarrow tables of one fixed schema, whether rows succeed or fail."""

    def __init__(
        self,
        schema: Any,
        spec: Spec,
        labels: Sequence[str],
        selection: Selection,
        *,
        aggregated: bool,
        rename: Callable[[str], str],
    ) -> None:
        """Take the input's schema, with its columns under the names of the row contract.

        `rename` turns these names back into the user's own.
        """
        pa = import_pyarrow("columns")
        self._labels, self._selection, self._rename = tuple(labels), selection, rename
        self._grouped = selection.group_by is not None
        self._flat = self._grouped and selection.best
        names = [*schema.names, *(["responses"] if self._grouped and not self._flat else [])]
        several = "responses" in names or self._grouped
        single = not several or selection.best or bool({"response", "text", "steps"} & set(schema.names))
        self._added = score_types(
            single=single and not (self._grouped and not selection.best),
            ranking=several and not selection.best,
            pair="chosen" in names,
            spec=spec,
            labels=labels,
            aggregated=aggregated,
        )
        own = [field for field in schema if field.name not in self._added]
        # If rows may have one answer or several, the best of several is written to the column of the single answer.
        self._both = selection.best and not self._grouped and {"response", "responses"} <= set(schema.names)
        own = [field for field in own if not (self._both and field.name == "responses")]
        self._own = [field.name for field in own]
        fields = []
        for field in own:
            if self._grouped and not self._flat and selection.is_own(field.name):
                name = "responses" if field.name == "response" else field.name
                fields.append(pa.field(rename(name), pa.list_(field.type)))
            elif field.name == "responses" and selection.best:
                fields.append(pa.field(rename("response"), field.type.value_type))
            elif field.name == "responses" and selection.top and not self._grouped:
                fields.append(pa.field(rename(field.name), pa.list_(field.type.value_type)))
            else:
                fields.append(field.with_name(rename(field.name)))
        metadata = {name: value for name, value in (schema.metadata or {}).items() if name != b"huggingface"}
        self.schema = pa.schema([*fields, *(pa.field(*each) for each in self._added.items())], metadata=metadata)

    def __call__(
        self, lines: Sequence[Line], results: Sequence[ScoredRow | RewardRTError], summary: Summary
    ) -> list[bytes]:
        """Return the rows that are kept as one packed table, or nothing."""
        try:
            table = self.table(lines, results, summary)
            return [pack_table(table)] if table is not None else []
        except (ValueError, NotImplementedError, TypeError, KeyError) as error:  # pyarrow's, of rare types
            reason = " ".join(str(error).split())[:200]
            raise RewardRTError(
                f"columns of such types cannot be taken along ({reason}); choose --format jsonl"
            ) from error

    def table(self, lines: Sequence[Line], results: Sequence[ScoredRow | RewardRTError], summary: Summary) -> Any:
        """Return the rows that are kept as a pyarrow table, or None if there are none."""
        kept: list[Kept] = []
        for line, result in zip(lines, results, strict=True):
            settled = self._selection.settle(line, result, self._labels)
            summary.count(line, settled.outcome, kept=bool(settled.kept))
            kept += settled.kept
        return self._table(kept) if kept else None

    def _table(self, kept: Sequence[Kept]) -> Any:
        pa = import_pyarrow("columns")
        own = self._lists(kept) if self._grouped and not self._flat else self._rows(kept)
        added = [column_of([each.scores.get(name) for each in kept], kind) for name, kind in self._added.items()]
        columns = [
            column.cast(field.type) if column.type != field.type else column
            for column, field in zip([*own, *added], self.schema, strict=True)
        ]
        return pa.Table.from_arrays(columns, schema=self.schema)

    def _rows(self, kept: Sequence[Kept]) -> list[Any]:
        """Return the columns of rows that are written as rows; lists of answers are reduced to the chosen ones."""
        pa = import_pyarrow("columns")
        table = rows_of([each.line for each in kept])
        columns = []
        for name, field in zip(self._own, self.schema, strict=False):
            column = table.column(table.schema.names.index(self._rename(name)))
            if name == "responses" and not self._flat and (self._selection.best or self._selection.top):
                column = pa.array([self._answers(each) for each in kept], field.type)
            elif name == "response" and self._both:
                chosen = [self._answers(each) if each.chosen else each.line.fields.get(name) for each in kept]
                column = pa.array(chosen, field.type)
            columns.append(column)
        return columns

    def _answers(self, each: Kept) -> Any:
        answers: Any = each.line.fields.get("responses")
        if self._selection.best:
            return answers[each.chosen[0]] if each.chosen else None
        return [answers[index] for index in each.chosen] if each.chosen else answers

    def _lists(self, kept: Sequence[Kept]) -> list[Any]:
        """Return the columns of groups: shared fields from the first row, lists of all other fields."""
        pa = import_pyarrow("columns")
        members = [member for each in kept for member in each.line.members]
        table = rows_of(members)
        first, order, offsets = [], [], [0]
        start = 0
        for each in kept:
            size = len(each.line.members)
            first.append(start)
            order += [start + index for index in (each.chosen or range(size))]
            offsets.append(len(order))
            start += size
        columns = []
        for name in self._own:
            column = table.column(table.schema.names.index(self._rename(name))).combine_chunks()
            if self._selection.is_own(name):
                values = column.take(pa.array(order, pa.int64()))
                columns.append(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values))
            else:
                columns.append(column.take(pa.array(first, pa.int64())))
        return columns


def score_types(
    *, single: bool, ranking: bool, pair: bool, spec: Spec, labels: Sequence[str], aggregated: bool
) -> dict[str, Any]:
    """Return the pyarrow types of the fields that scoring adds to rows of these shapes.

    With rows of several answers, `tokens`, `truncated` and `objectives` are lists.
    """
    pa = import_pyarrow("columns")
    number, count = pa.float32(), pa.int32()
    types: dict[str, Any] = {}
    if spec.input == "steps":
        types["step_rewards"] = pa.list_(number)
    if single and (spec.input != "steps" or aggregated):
        types["reward"] = number
    if ranking:
        types |= {"rewards": pa.list_(number), "best": count}
        if spec.input == "pairwise":
            types["comparisons"] = pa.list_(pa.list_(number))
    if pair:
        types |= dict.fromkeys(("chosen_reward", "rejected_reward", "margin"), number)
    several = ranking or pair
    types |= {name: pa.list_(count) if several else count for name in ("tokens", "truncated")}
    if labels:
        named = pa.struct([(label, number) for label in labels])
        types["objectives"] = pa.list_(named) if several else named
    return types | {"error": pa.string()}
