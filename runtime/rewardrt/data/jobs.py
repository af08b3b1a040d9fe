"""One scoring job: from files of rows to one output, which can be resumed after an interruption.

find_inputs -> RowReader.lines -> renamed -> grouped_lines -> score_file -> encoder -> Unfinished -> finish
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rewardrt.bundle.manifest import manifest_sha256
from rewardrt.bundle.spec import AggregateRule
from rewardrt.data.columns import plain
from rewardrt.data.files import WINDOW_ROWS, Encoder, JsonEncoder, Summary, score_file
from rewardrt.data.inputs import InputFile
from rewardrt.data.journal import Unfinished
from rewardrt.data.lines import Line
from rewardrt.data.output_formats import OUTPUT_FORMATS, finish
from rewardrt.data.readers import Rows
from rewardrt.data.selection import EVERYTHING, Selection, grouped_lines
from rewardrt.data.tables import TableEncoder, score_types
from rewardrt.errors import RewardRTError, RowError
from rewardrt.reward_model import RewardModel
from rewardrt.scoring.scored import ScoredRow


@dataclass(frozen=True)
class JobOptions:
    """What is done with the rows: options of `rewardrt score`.

    `columns` maps the row contract's field names to the user's. `rows` are the first row to score and the row after the
    last.
    """

    normalize: bool | None = None
    aggregate: AggregateRule | None = None
    labels: tuple[str, ...] = ()
    instruction: str | None = None
    selection: Selection = EVERYTHING
    columns: dict[str, str] = field(default_factory=dict)
    rows: tuple[int, int | None] = (0, None)

    @property
    def prompt_field(self) -> str:
        """The input's field that is equal for rows of one prompt; "" for the row contract's own names."""
        if self.selection.group_by is not None:
            return self.columns.get(self.selection.group_by, self.selection.group_by)
        return self.columns.get("prompt", "")


class Job:
    """The rows of a reader, a model that scores them, and the options."""

    def __init__(self, model: RewardModel, reader: Rows, options: JobOptions) -> None:
        """Check what can be checked before rows are read. Raises RewardRTError."""
        self.model, self.reader, self.options = model, reader, options
        model.answers.check_options(normalize=options.normalize, aggregate=options.aggregate)
        if reader.schema is not None:
            grouped = [options.prompt_field] if options.selection.group_by is not None else []
            for name in (*options.columns.values(), *grouped):
                if name not in reader.schema.names:
                    raise RewardRTError(f"{reader.files[0].name}: has no column {name!r}, but {_listed(reader)}")
            for ours, theirs in options.columns.items():
                if ours in reader.schema.names and ours not in options.columns.values():
                    raise RewardRTError(
                        f"{reader.files[0].name}: has a column {ours!r} and also {theirs!r}, which --columns renames "
                        "to it"
                    )
        if options.instruction is not None:
            model.answers.use_instruction(options.instruction)

    def identity(self, format_name: str) -> dict[str, Any]:
        """Return what has to be equal for an unfinished output to be resumed."""
        options = asdict(self.options)
        return {
            "bundle": manifest_sha256(self.model.bundle.path),
            "precision": self.model.precision,
            "provider": self.model.provider,
            "inputs": [[file.name, file.size, _digest(file)] for file in self.reader.files],
            "format": self.staging(format_name),
            **{f"option {name}": value for name, value in options.items()},
        }

    def staging(self, format_name: str) -> str:
        """Return the form in which rows are written until the output is finished.

        An unfinished output can be resumed with another format of the same form.
        """
        each = OUTPUT_FORMATS[format_name]
        if each.table is not None and self.reader.schema is not None:
            return "tables"
        return format_name if each.pack is not None else "jsonl"

    def encoder(self, format_name: str) -> Encoder:
        """Return the encoder of scored rows for an output format: to lines, or to packed tables."""
        options = self.options
        if self.reader.schema is None or OUTPUT_FORMATS[format_name].table is None:
            pack = OUTPUT_FORMATS[format_name].pack
            finished = plain if self.reader.schema is not None else None
            lines = JsonEncoder(options.labels, options.selection, partial(_renamed_back, options.columns, finished))
            return lines if pack is None else _Packed(lines, pack)
        return self.table_encoder()

    def table_encoder(self) -> TableEncoder:
        """Return the encoder from a file with columns to an output with columns."""
        names = {theirs: ours for ours, theirs in self.options.columns.items()}
        schema = self.reader.schema
        for index, name in enumerate(schema.names):
            schema = schema.set(index, schema.field(index).with_name(names.get(name, name)))
        return TableEncoder(
            schema,
            self.model.spec,
            self.options.labels,
            self.options.selection,
            aggregated=self.options.aggregate is not None,
            rename=lambda name: self.options.columns.get(name, name),
        )

    def run(
        self,
        write: Callable[[bytes], object],
        encoder: Encoder,
        *,
        summary: Summary | None = None,
        progress: Callable[[Summary], None] | None = None,
    ) -> Summary:
        """Score the rows and write each; `summary` counts the rows that were already done and are skipped."""
        start, stop = self.options.rows
        done = summary.read if summary is not None else 0
        grouped = self.options.selection.group_by is not None
        passed = 0 if grouped else done  # groups are read again, to find one that occurs twice
        lines = self.reader.lines(start + passed)
        if stop is not None:
            lines = itertools.islice(lines, stop - start - passed)
        if self.options.columns:
            lines = renamed(lines, self.options.columns)
        if grouped:
            lines = _after(grouped_lines(lines, self.options.selection), done)
        return score_file(
            self.model.answers.prepare,
            partial(self.model.score_prepared, normalize=self.options.normalize, aggregate=self.options.aggregate),
            lines,
            write,
            encode=encoder,
            window=WINDOW_ROWS,
            give_up=start == 0,  # not in a later shard or piece: the rows before it may be fine
            summary=summary,
            progress=progress,
        )

    def write(
        self, output: Unfinished, format_name: str, *, progress: Callable[[Summary], None] | None = None
    ) -> tuple[Summary, list[str]]:
        """Score the remaining rows and make the output; return the counts, and remarks for the user."""
        encoder = self.encoder(format_name)

        def safe(summary: Summary) -> None:
            output.commit(summary)
            if progress is not None:
                progress(summary)

        summary = self.run(output.write, encoder, summary=output.summary, progress=safe)
        output.commit(summary)
        said = self.finish(encoder, format_name, output.part, output.target, summary)
        output.forget()
        return summary, said

    def finish(self, encoder: Encoder, format_name: str, part: Path, target: Path, summary: Summary) -> list[str]:
        """Make the output from what an encoder wrote to the part file; return remarks for the user."""
        schema = encoder.schema if isinstance(encoder, TableEncoder) else None
        known = self.known_types(summary) if OUTPUT_FORMATS[format_name].table is not None else {}
        return finish(format_name, part, target, schema, known)

    def known_types(self, summary: Summary) -> dict[str, Any]:
        """Return the column types of what scoring added to rows of JSON, for an output with columns."""
        best = self.options.selection.best
        return score_types(
            single="single" in summary.shapes or (best and "ranking" in summary.shapes),
            ranking="ranking" in summary.shapes and not best,
            pair="pair" in summary.shapes,
            spec=self.model.spec,
            labels=self.options.labels,
            aggregated=self.options.aggregate is not None,
        )


class _Packed:
    """An encoder that compresses the lines of each window together."""

    def __init__(self, lines: JsonEncoder, pack: Callable[[bytes], bytes]) -> None:
        self._lines, self._pack = lines, pack

    def __call__(
        self, lines: Sequence[Line], results: Sequence[ScoredRow | RewardRTError], summary: Summary
    ) -> list[bytes]:
        data = b"".join(self._lines(lines, results, summary))
        return [self._pack(data)] if data else []


def _after(groups: Iterator[Line], rows: int) -> Iterator[Line]:
    """Skip the groups that contain the first `rows` rows."""
    for group in groups:
        if rows <= 0:
            yield group
        rows -= max(1, len(group.members))


def renamed(lines: Iterator[Line], columns: dict[str, str]) -> Iterator[Line]:
    """Rename fields to their names in the row contract."""
    names = {theirs: ours for ours, theirs in columns.items()}
    for line in lines:
        row = line.fields
        twice = (
            ours
            for ours, theirs in columns.items()
            if ours not in names and row.get(ours) is not None and row.get(theirs) is not None
        )
        if (both := next(twice, None)) is not None:
            message = f"row {line.number}: has {both!r} and also {columns[both]!r}, which --columns renames to it"
            error = RowError(message)
            yield replace(line, error=error)
        else:
            # A field that is null counts as missing, so the renamed field may take its name.
            kept = {
                name: value
                for name, value in row.items()
                if name not in columns or name in names or columns[name] not in row
            }
            yield replace(line, row={names.get(name, name): kept[name] for name in kept}) if row else line


def _renamed_back(columns: dict[str, str], finished: Callable[[Any], Any] | None, row: dict[str, Any]) -> Any:
    # A row that has fields under both names is an error; it keeps both.
    named = {name if columns.get(name) in row else columns.get(name, name): value for name, value in row.items()}
    return finished(named) if finished is not None else named


def _digest(file: InputFile) -> str:
    """Return a text that changes when a file does: a hash of its contents, or its time in an object store."""
    if "://" in file.name or file.size is None:
        return file.changed
    digest = hashlib.blake2b(digest_size=16)
    with file.open() as stream:
        while data := stream.read(2**22):
            digest.update(data)
    return digest.hexdigest()


def _listed(reader: Rows) -> str:
    names = list(reader.schema.names)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
