"""A job in pieces: contiguous parts of the rows, each scored and written by itself, here or by many processes.

The pieces stand in a folder, of this machine or of an object store, as `part-00000.parquet` and so on. A piece that is
there is whole; its `_00000.json` beside it says what was counted, and `_job.json` what the job is. So a job goes on
after whatever ended it, and it does not matter who scored which piece. When all are there, `_SUCCESS` stands for these.
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

PIECE_ROWS = 16_384  # of a part that stays
JOINED_ROWS = 4_096  # of one that is joined to others: many, so that all processes have work to the end
JOB, DONE = "_job.json", "_SUCCESS"


class Folder(Protocol):
    """Where pieces stand: small files by name."""

    def names(self) -> set[str]:
        """Return the names of what is there."""

    def read(self, name: str) -> bytes:
        """Return what a file holds."""

    def put(self, name: str, path: Path) -> None:
        """Have a file there under a name, all of it at once."""

    def delete(self, name: str) -> None:
        """Take a file away."""


class LocalFolder:
    """A folder of this machine, or of a disk that machines share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refuse(path, error)

    def names(self) -> set[str]:
        """Return the names of what is there."""
        return {each.name for each in self.path.iterdir()}

    def read(self, name: str) -> bytes:
        """Return what a file holds."""
        return (self.path / name).read_bytes()

    def put(self, name: str, path: Path) -> None:
        """Have a file there under a name, all of it at once."""
        moved = self.path / f"_{name}.{secrets.token_hex(4)}"
        try:
            shutil.copyfile(path, moved)
            moved.replace(self.path / name)
        except OSError as error:
            moved.unlink(missing_ok=True)
            refuse(self.path / name, error)

    def delete(self, name: str) -> None:
        """Take a file away."""
        (self.path / name).unlink(missing_ok=True)


class RemoteFolder:
    """A folder of an object store, by pyarrow."""

    def __init__(self, uri: str) -> None:
        self._filesystem, self._path = open_filesystem(uri)
        self._uri = uri

    def names(self) -> set[str]:
        """Return the names of what is there."""
        from pyarrow import fs

        with reading(self._uri):
            selector = fs.FileSelector(self._path, allow_not_found=True)
            return {each.base_name for each in self._filesystem.get_file_info(selector)}

    def read(self, name: str) -> bytes:
        """Return what a file holds."""
        with reading(f"{self._uri}/{name}"), self._filesystem.open_input_stream(f"{self._path}/{name}") as stream:
            return bytes(stream.read())

    def put(self, name: str, path: Path) -> None:
        """Have a file there under a name: an object appears when it is whole."""
        try:
            self._filesystem.create_dir(self._path)
            with path.open("rb") as file, self._filesystem.open_output_stream(f"{self._path}/{name}") as stream:
                shutil.copyfileobj(file, stream, 2**22)
        except OSError as error:
            refuse(f"{self._uri}/{name}", error)

    def delete(self, name: str) -> None:
        """Take a file away."""
        self._filesystem.delete_file(f"{self._path}/{name}")


def open_folder(name: str) -> Folder:
    """Return the folder of a path or a URI."""
    return RemoteFolder(name.rstrip("/")) if is_uri(name) else LocalFolder(Path(name))


@dataclass(frozen=True)
class PieceWork:
    """What a process needs to know to score pieces: everything but which ones.

    `load` are the options of `RewardModel.load`. With `joined` the pieces are not in the output's format yet: they are
    what a job writes before its output is finished.
    """

    bundle: str
    inputs: tuple[str, ...]
    folder: str
    format_name: str
    options: JobOptions
    load: dict[str, Any] = field(default_factory=dict)
    joined: bool = False

    def suffix(self) -> str:
        """Return what the names of the pieces end with."""
        return ".piece" if self.joined else OUTPUT_FORMATS[self.format_name].suffixes[0]


@dataclass(frozen=True)
class Piece:
    """Some of the rows: the first, and the one after the last."""

    index: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The number in names of files."""
        return f"{self.index:05}"


class PieceScorer:
    """Scores pieces with one model, which is loaded once."""

    def __init__(self, work: PieceWork, model: RewardModel | None = None) -> None:
        """Take the model, or load it."""
        self.work = work
        self.model = model if model is not None else RewardModel.load(work.bundle, **work.load)
        self._folder = open_folder(work.folder)
        self._reader = RowReader(find_inputs(work.inputs))

    def __call__(self, piece: Piece) -> Summary:
        """Score one piece, and have it in the folder."""
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
    """A job in pieces, from its beginning, or from where it was left."""

    def __init__(self, work: PieceWork, job: Job, *, resume: bool) -> None:
        """Look at what is there. Raises RewardRTError."""
        if not work.joined and work.format_name == "datasets":
            raise RewardRTError("datasets: is a folder by itself; a folder of parts is of parquet, arrow or jsonl")
        if not work.joined and OUTPUT_FORMATS[work.format_name].table is not None and job.reader.schema is None:
            raise RewardRTError(
                f"{work.folder}: lines of JSON become columns when all rows are known, and parts know their own; "
                "write parts of jsonl, or one file"
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
        """Have what is left scored, by what gives a summary of each piece in any order, and say that all is there."""
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
        """Yield what the pieces hold, in their order."""
        for piece in self.pieces:
            yield self._folder.read(f"part-{piece.name}{self.work.suffix()}")

    def _put(self, name: str, text: str) -> None:
        with tempfile.TemporaryDirectory(prefix="rewardrt-") as temporary:
            path = Path(temporary) / "file"
            path.write_text(text, encoding="utf-8")
            self._folder.put(name, path)


def join(pieces: PiecesJob, job: Job, target: Path) -> list[str]:
    """Make one output of pieces that are all there, and take them away; return what is to be said of it."""
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
