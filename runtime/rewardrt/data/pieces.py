"""A job in pieces: contiguous parts of the rows, each scored and written separately, by one or many processes.

The pieces are written to a folder, on this machine or in an object store, as `part-00000.parquet` and so on. A piece
that exists is complete. For each, `_00000.json` has its counts; `_job.json` says what the job is. So a job can be
resumed after any interruption, and any process can score any piece. When all pieces exist, `_SUCCESS` replaces these
files.
"""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from rewardrt.data.compression import reading
from rewardrt.data.files import Summary
from rewardrt.data.inputs import find_inputs, is_uri, open_filesystem
from rewardrt.data.jobs import Job, JobOptions
from rewardrt.data.journal import changed
from rewardrt.data.output_formats import OUTPUT_FORMATS
from rewardrt.data.outputs import refuse
from rewardrt.data.readers import RowReader
from rewardrt.data.shards import piece_bounds
from rewardrt.errors import RewardRTError
from rewardrt.reward_model import RewardModel

PIECE_ROWS = 16_384  # rows of a piece that stays a file of its own
JOINED_ROWS = 4_096  # rows of a piece that is joined to others: small, so that all processes are busy until the end
JOB, DONE = "_job.json", "_SUCCESS"


class Folder(Protocol):
    """Where pieces are stored: small files by name."""

    def names(self) -> set[str]:
        """Return the names of all files."""

    def read(self, name: str) -> bytes:
        """Return the contents of a file."""

    def put(self, name: str, path: Path) -> None:
        """Store a file under a name; it appears only when it is complete."""

    def delete(self, name: str) -> None:
        """Delete a file."""


class LocalFolder:
    """A folder on this machine, or on a disk shared by several machines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refuse(path, error)

    def names(self) -> set[str]:
        """Return the names of all files."""
        return {each.name for each in self.path.iterdir()}

    def read(self, name: str) -> bytes:
        """Return the contents of a file."""
        return (self.path / name).read_bytes()

    def put(self, name: str, path: Path) -> None:
        """Store a file under a name; it appears only when it is complete."""
        moved = self.path / f"_{name}.{secrets.token_hex(4)}"
        try:
            shutil.copyfile(path, moved)
            moved.replace(self.path / name)
        except OSError as error:
            moved.unlink(missing_ok=True)
            refuse(self.path / name, error)

    def delete(self, name: str) -> None:
        """Delete a file."""
        (self.path / name).unlink(missing_ok=True)


class RemoteFolder:
    """A folder in an object store, accessed by pyarrow."""

    def __init__(self, uri: str) -> None:
        self._filesystem, self._path = open_filesystem(uri)
        self._uri = uri

    def names(self) -> set[str]:
        """Return the names of all files."""
        from pyarrow import fs

        with reading(self._uri):
            selector = fs.FileSelector(self._path, allow_not_found=True)
            return {each.base_name for each in self._filesystem.get_file_info(selector)}

    def read(self, name: str) -> bytes:
        """Return the contents of a file."""
        with reading(f"{self._uri}/{name}"), self._filesystem.open_input_stream(f"{self._path}/{name}") as stream:
            return bytes(stream.read())

    def put(self, name: str, path: Path) -> None:
        """Store a file under a name; in an object store it appears only when it is complete."""
        try:
            self._filesystem.create_dir(self._path)
            with path.open("rb") as file, self._filesystem.open_output_stream(f"{self._path}/{name}") as stream:
                shutil.copyfileobj(file, stream, 2**22)
        except OSError as error:
            refuse(f"{self._uri}/{name}", error)

    def delete(self, name: str) -> None:
        """Delete a file."""
        self._filesystem.delete_file(f"{self._path}/{name}")


def open_folder(name: str) -> Folder:
    """Return the folder at a path or a URI."""
    return RemoteFolder(name.rstrip("/")) if is_uri(name) else LocalFolder(Path(name))


@dataclass(frozen=True)
class PieceWork:
    """What a process needs to score pieces, except which ones.

    `load` are the options of `RewardModel.load`. With `joined` the pieces are not in the output's format, but in the
    form that a job writes before its output is finished; they are joined later.
    """

    bundle: str
    inputs: tuple[str, ...]
    folder: str
    format_name: str
    options: JobOptions
    load: dict[str, Any] = field(default_factory=dict)
    joined: bool = False

    def suffix(self) -> str:
        """Return the suffix of the pieces' file names."""
        return ".piece" if self.joined else OUTPUT_FORMATS[self.format_name].suffixes[0]


@dataclass(frozen=True)
class Piece:
    """Some of the rows: the first one, and the one after the last."""

    index: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The piece's number in file names."""
        return f"{self.index:05}"


class PieceScorer:
    """Scores pieces with one model, which is loaded once."""

    def __init__(self, work: PieceWork, model: RewardModel | None = None) -> None:
        """Take the model, or load it from the work's bundle."""
        self.work = work
        self.model = model if model is not None else RewardModel.load(work.bundle, **work.load)
        self._folder = open_folder(work.folder)
        self._reader = RowReader(find_inputs(work.inputs))

    def __call__(self, piece: Piece) -> Summary:
        """Score one piece, store it in the folder, and return its counts."""
        options = replace(self.work.options, rows=(piece.start, piece.stop))
        job = Job(self.model, self._reader, options)
        encoder = job.encoder(self.work.format_name)
        with tempfile.TemporaryDirectory(prefix="rewardrt-") as temporary:
            part, target = Path(temporary) / "part", Path(temporary) / "whole"
            with part.open("wb") as file:
                summary = job.run(file.write, encoder)
            if self.work.joined:
                target = part
            else:
                job.finish(encoder, self.work.format_name, part, target, summary)
            self._folder.put(f"part-{piece.name}{self.work.suffix()}", target)
            counted = Path(temporary) / "counted"
            counted.write_text(json.dumps(asdict(summary)), encoding="utf-8")
            self._folder.put(f"_{piece.name}.json", counted)
        return summary


class PiecesJob:
    """A job in pieces, new or resumed."""

    def __init__(self, work: PieceWork, job: Job, *, resume: bool) -> None:
        """Check what is in the folder. Raises RewardRTError."""
        if not work.joined and work.format_name == "datasets":
            raise RewardRTError("datasets: is a folder by itself; a folder of parts is of parquet, arrow or jsonl")
        if not work.joined and OUTPUT_FORMATS[work.format_name].table is not None and job.reader.schema is None:
            raise RewardRTError(
                f"{work.folder}: the columns of JSON rows are known only after all rows were read, so parts cannot "
                f"be {work.format_name}; write parts of jsonl, or one file"
            )
        self.work, self._folder, self.summary = work, open_folder(work.folder), Summary()
        rows = JOINED_ROWS if work.joined else PIECE_ROWS
        there = self._folder.names()
        identity = json.loads(json.dumps(job.identity(work.format_name) | {"piece rows": rows}))
        if DONE in there:
            raise RewardRTError(f"{work.folder}: is whole; name another output, or delete it")
        if JOB in there and not resume:
            raise RewardRTError(
                f"{work.folder}: an unfinished output is there; go on with it by --resume, or delete it"
            )
        if JOB in there:
            with reading(f"{work.folder}/{JOB}"):
                before = json.loads(self._folder.read(JOB))
            if (difference := changed(before, identity)) is not None:
                raise RewardRTError(f"{work.folder}: was begun with {difference}; go on with that, or delete it")
        elif there:
            raise RewardRTError(f"{work.folder}: is a folder with other files in it; name another")
        else:
            self._put(JOB, json.dumps(identity))
        bounds = piece_bounds(job.reader, rows, job.options.prompt_field)
        self.pieces = [Piece(index, start, stop) for index, (start, stop) in enumerate(bounds)]
        self.rows = bounds[-1][1] if bounds else 0
        self.left = []
        for piece in self.pieces:
            if f"_{piece.name}.json" in there:
                self.summary.add(Summary(**json.loads(self._folder.read(f"_{piece.name}.json"))))
            else:
                self.left.append(piece)

    def run(
        self, results: Callable[[Sequence[Piece]], Iterable[Summary]], progress: Callable[[Summary], None]
    ) -> Summary:
        """Have the remaining pieces scored and mark the job as complete; return the counts.

        `results` takes the pieces and yields the counts of each as it is done, in any order.
        """
        for summary in results(self.left):
            self.summary.add(summary)
            progress(self.summary)
        if not self.work.joined:
            self._put(DONE, "")
            for piece in self.pieces:
                self._folder.delete(f"_{piece.name}.json")
            self._folder.delete(JOB)
        return self.summary

    def parts(self) -> Iterator[bytes]:
        """Yield the contents of the pieces in order."""
        for piece in self.pieces:
            yield self._folder.read(f"part-{piece.name}{self.work.suffix()}")

    def _put(self, name: str, text: str) -> None:
        with tempfile.TemporaryDirectory(prefix="rewardrt-") as temporary:
            path = Path(temporary) / "file"
            path.write_text(text, encoding="utf-8")
            self._folder.put(name, path)


def join(pieces: PiecesJob, job: Job, target: Path) -> list[str]:
    """Join all pieces into one output and delete them; return remarks for the user."""
    format_name = pieces.work.format_name
    encoder = job.encoder(format_name)
    part = target.with_name(f"{target.name}.part")
    try:
        with part.open("wb") as file:
            for data in pieces.parts():
                file.write(data)
    except OSError as error:
        refuse(target, error)
    said = job.finish(encoder, format_name, part, target, pieces.summary)
    shutil.rmtree(pieces.work.folder, ignore_errors=True)
    return said
