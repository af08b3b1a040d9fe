"""The files of a benchmark, and the question in each of their rows."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from rewardrt.data.inputs import InputFile, find_inputs
from rewardrt.data.jobs import renamed
from rewardrt.data.lines import Line
from rewardrt.data.readers import RowReader
from rewardrt.errors import RewardRTError, RowError
from rewardrt.evaluate.benchmarks import BENCHMARKS
from rewardrt.evaluate.layouts import LOOKED_AT, Layout, Question, recognise
from rewardrt.text.rows import REFUSED_FIELDS, TEMPLATE_FIELDS

_ENDINGS = (".gz", ".zst", ".jsonl", ".json", ".parquet", ".pq", ".arrow", ".feather", ".ipc")
_CARRIED = (*TEMPLATE_FIELDS, "instruction", *REFUSED_FIELDS)  # fields that may change the text: rendered or refused


@dataclass(frozen=True)
class Options:
    """How rows are read and scored. `earlier` names fields with earlier rewards, to compare with."""

    columns: dict[str, str] = field(default_factory=dict)
    layout: str | None = None
    by: str | None = None
    rows: int | None = None  # the most rows of each file
    normalize: bool | None = None
    threshold: float = 0.5
    earlier: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """A file of a benchmark and its layout."""

    file: InputFile
    layout: Layout

    @property
    def name(self) -> str:
        """The file's name without folders."""
        return PurePath(self.file.name).name

    @property
    def stem(self) -> str:
        """The file's name without folders and endings."""
        name = self.name
        while (end := next((end for end in _ENDINGS if name.endswith(end)), None)) is not None:
            name = name.removesuffix(end)
        return name


@dataclass(frozen=True)
class Asked(Line):
    """A line whose row is what is scored, with its question and its earlier rewards."""

    question: Question | None = None
    by: str = ""
    earlier: tuple[float, ...] | RowError = ()


def find_sources(names: Sequence[str], options: Options) -> list[Source]:
    """Return the named files with their layouts. Raises RewardRTError."""
    found = []
    for file in find_inputs(names):
        if file.size is None:
            raise RewardRTError(f"{file.name}: is read once, and an evaluation may read its rows again; name a file")
        if options.layout is not None:
            found.append(Source(file, BENCHMARKS[options.layout]))
            continue
        lines = itertools.islice(lines_of(RowReader([file]), options), LOOKED_AT)
        rows = [line.row for line in lines if isinstance(line.row, dict)]
        found.append(Source(file, recognise(rows, BENCHMARKS.values(), file.name)))
    return found


def lines_of(reader: RowReader, options: Options) -> Iterator[Line]:
    """Yield the rows of a file, with its columns renamed as `options.columns` says."""
    return renamed(reader.lines(), options.columns) if options.columns else reader.lines()


def asked_lines(lines: Iterator[Line], source: Source, options: Options, *, several: bool) -> Iterator[Line]:
    """Yield each line with the question of its row, or with its error.

    With `several` files, rows without a subset get the file's name as their subset.
    """
    for line in lines:
        row, error = line.fields, line.given if isinstance(line.given, RowError) else None
        question: Question | None = None
        if error is None:
            try:
                question = source.layout.read(row, source.stem)
            except RowError as found:
                error = RowError(f"row {line.number}: {found}")
        if question is None:
            yield Asked(line.number, line.bytes, {}, whole=line.whole, error=error)
            continue
        if several and not question.subset:
            question = replace(question, subset=source.stem)
        asked = {name: row[name] for name in _CARRIED if row.get(name)} | question.row
        by = "" if options.by is None else _name(row.get(options.by))
        earlier = _earlier(row, question, options.earlier, line.number) if options.earlier else ()
        yield Asked(line.number, line.bytes, asked, whole=line.whole, question=question, by=by, earlier=earlier)


def _name(value: object) -> str:
    return "(none)" if value is None else " ".join(str(value).split())[:80]


def _earlier(row: dict[str, Any], asked: Question, fields: Sequence[str], number: int) -> tuple[float, ...] | RowError:
    """Return the earlier rewards of a row's answers: the numbers, or lists of numbers, in these fields in order."""
    found: list[object] = []
    for name in fields:
        value = row.get(name)
        found += list(value) if isinstance(value, list | tuple) else [value]
    flat = [each[0] if isinstance(each, list | tuple) and len(each) == 1 else each for each in found]
    count = len(asked.right) or len(asked.row["steps"])
    where = f"row {number}: {','.join(fields)}: expected {count} finite numbers, one for each of its "
    where += "answers" if asked.right else "steps"
    numbers = [float(each) for each in flat if isinstance(each, int | float) and not isinstance(each, bool)]
    if len(numbers) != len(flat) or len(flat) != count:
        return RowError(f"{where}; found {len(numbers)}")
    odd = next((each for each in numbers if not math.isfinite(each)), None)
    return tuple(numbers) if odd is None else RowError(f"{where}; found {odd}")


def sha256_of(file: InputFile) -> str:
    """Return the SHA-256 of a file's bytes as stored, in hex."""
    with file.open() as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
