"""Find the input files of a command: by name, glob, folder or URI, on this machine or in an object store."""

from __future__ import annotations

import glob
import json
import os
import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, cast

from rewardrt.data.compression import import_pyarrow
from rewardrt.errors import RowError

STANDARD_INPUT = "-"
UNFINISHED = (".part", ".journal")  # suffixes of the files next to an output until it is complete
DATASET = ("state.json", "dataset_info.json")  # files of a folder that `datasets` wrote with save_to_disk


@dataclass(frozen=True)
class InputFile:
    """One file of rows. `size` is in bytes, None for a pipe. `changed` is a text that changes when the file does."""

    name: str
    open: Callable[[], BinaryIO]
    size: int | None
    changed: str


def find_inputs(names: Sequence[str], output: str | None = None) -> list[InputFile]:
    """Return the files of all names in order; those of a folder or a glob are sorted. Raises RowError.

    The command's own `output`, and its unfinished files, are left out of folders and globs.
    """
    if "" in names:
        raise RowError("an input has no name; expected a file of rows, a folder, or - for standard input")
    if STANDARD_INPUT in names:
        if len(names) > 1:
            raise RowError("- is standard input, and is given alone")
        return [InputFile("standard input", _open_standard_input, None, "")]
    written = {os.path.abspath(f"{output}{end}") for end in ("", *UNFINISHED)} if output is not None else set()
    found = [each for name in names for each in (_remote(name) if "://" in name else _local(name, written))]
    if len(found) > 1 and (pipe := next((each for each in found if each.size is None), None)) is not None:
        raise RowError(f"{pipe.name}: is a pipe, which is read once; give it alone, or as standard input")
    if not found:
        raise RowError(f"{', '.join(names)}: no file of rows is there")
    return found


def absolute(names: Sequence[str]) -> tuple[str, ...]:
    """Return names that work in another process too, whatever its working directory."""
    return tuple(name if is_uri(name) or name == STANDARD_INPUT else os.path.abspath(name) for name in names)


def is_uri(name: str) -> bool:
    """Return whether a name is a URI of an object store."""
    return "://" in name


def open_filesystem(uri: str) -> tuple[Any, str]:
    """Return pyarrow's file system for a URI, and the path in it. Raises RowError or MissingExtraError."""
    import_pyarrow(uri)
    from pyarrow import fs

    try:
        return cast(tuple[Any, str], fs.FileSystem.from_uri(uri))
    except (ValueError, OSError, NotImplementedError) as error:
        raise RowError(f"{uri}: cannot be opened ({_line(error)})") from error


def _open_standard_input() -> BinaryIO:
    if sys.stdin is None:
        raise RowError("standard input is closed; send it rows, or name a file")
    # Not sys.stdin.buffer: at exit Python waits for its lock, which a thread waiting for a line would hold.
    return open(sys.stdin.fileno(), "rb", closefd=False)


def _local(name: str, written: set[str]) -> list[InputFile]:
    path = Path(name)
    try:
        if path.is_dir():
            return _folder(path, written)
        if not path.exists() and glob.has_magic(name):
            found = sorted(glob.glob(name, recursive=True))
            files = [
                _file(Path(each)) for each in found if not Path(each).is_dir() and os.path.abspath(each) not in written
            ]
            if not files:
                raise RowError(f"{name}: no file has such a name")
            return files
        return [_file(path)]
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RowError(
            f"{name}: cannot be read ({reason}); expected a file of rows, a folder, or - for standard input"
        ) from error


def _file(path: Path) -> InputFile:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe can be read only once
        return InputFile(str(path), lambda: path.open("rb"), None, "")
    with path.open("rb"):  # check the permission to read
        pass
    return InputFile(str(path), lambda: path.open("rb"), status.st_size, str(status.st_mtime_ns))


def _folder(path: Path, written: set[str]) -> list[InputFile]:
    """Return the files of a folder: those listed by a saved data set, or else all that are not hidden."""
    if (path / "dataset_dict.json").is_file():
        splits = _read_names(path / "dataset_dict.json", lambda value: value["splits"])
        raise RowError(f"{path}: has the splits {', '.join(splits)}; name one of them, as {path}/{splits[0]}")
    if all((path / name).is_file() for name in DATASET):
        names = _read_names(path / DATASET[0], lambda value: [data["filename"] for data in value["_data_files"]])
        return [_file(path / name) for name in names]
    files = [each for each in sorted(path.iterdir()) if each.is_file() and each.name[0] not in "._"]
    files = [each for each in files if os.path.abspath(each) not in written]
    if not files:
        raise RowError(f"{path}: no file of rows is in this folder")
    return [_file(each) for each in files]


def _read_names(path: Path, names: Callable[[Any], list[Any]]) -> list[str]:
    """Return the names, at least one, that a file written by `datasets` lists. Raises RowError."""
    try:
        found = names(json.loads(path.read_text(encoding="utf-8")))
        if found and all(isinstance(name, str) for name in found):
            return found
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise RowError(f"{path}: names no files as `datasets` writes them; save the data set again")


def _remote(uri: str) -> list[InputFile]:
    filesystem, path = open_filesystem(uri)
    from pyarrow import fs

    scheme = uri.partition("://")[0]
    try:
        (info,) = filesystem.get_file_info([path])
        if info.type == fs.FileType.NotFound and glob.has_magic(path):
            folder, _, pattern = path.rpartition("/")
            every = filesystem.get_file_info(fs.FileSelector(folder))
            found = [each for each in every if each.is_file and fnmatchcase(each.base_name, pattern)]
        else:
            found = [info] if info.type == fs.FileType.File else []
            if info.type == fs.FileType.Directory:
                every = filesystem.get_file_info(fs.FileSelector(path))
                found = [each for each in every if each.is_file and each.base_name[0] not in "._"]
    except (ValueError, OSError) as error:
        raise RowError(f"{uri}: cannot be read ({_line(error)})") from error
    if not found:
        raise RowError(f"{uri}: no file has such a name")

    def opener(path: str) -> Callable[[], BinaryIO]:
        return lambda: cast(BinaryIO, filesystem.open_input_file(path))

    return [
        InputFile(f"{scheme}://{each.path}", opener(each.path), each.size, str(each.mtime_ns))
        for each in sorted(found, key=lambda each: str(each.path))
    ]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
