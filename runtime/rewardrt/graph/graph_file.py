"""Find the files that an ONNX graph reads besides itself, by parsing the protobuf message without the onnx package.

A graph names the files of its weights, and onnxruntime opens whatever is named there. A file that the manifest does not
list could therefore change the rewards. onnxruntime also refuses weights that a symbolic link places outside the
graph's folder. Only the protobuf fields that lead to file names are parsed; onnxruntime checks the rest.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from rewardrt.errors import BundleError

# For each message, the fields whose messages may name a file. Field numbers are from onnx.proto.
_FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_OPERATOR = 4  # of Node
_DEEPEST = 100  # nested messages; protobuf's own limit

_LOCATION = b"location"  # the key of an Entry whose value is a file name

Buffer = bytes | mmap.mmap
Field = tuple[int, int, int, int, int]  # number, wire type, offsets: start of the field, start and end of its value


class _DamagedError(Exception):
    """The bytes are not a protobuf message."""


def external_files(graph: Path) -> set[str]:
    """Return the names of the external files that a graph reads, as written in it: paths relative to its folder.

    Raises BundleError if the file is not a graph, or if it has an operator that opens files by other means.
    """
    try:
        if graph.stat().st_size == 0:
            raise _DamagedError("it is empty")  # mmap refuses empty files
        with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return {name.decode() for name in _names(data, 0, len(data), "Model", 0)}
    except (_DamagedError, ValueError, OSError) as error:  # ValueError: a name that is not UTF-8
        raise BundleError(f"{graph}: not an ONNX graph ({error}); copy the bundle again, or export again") from error


def resolve(graph: Path) -> tuple[Path | bytes, Path | None]:
    """Return the model for onnxruntime to open, and the folder of its weights if onnxruntime must be told.

    Without symbolic links this is the graph's path and None. onnxruntime only accepts weights inside the graph's
    folder, and resolves links before it checks. So if the graph or one of its files is a link, this returns the graph's
    bytes with the real files' names in them, and a folder that contains them all. onnxruntime maps the weights' files
    either way.

    Raises BundleError.
    """
    names = external_files(graph)
    base = os.path.realpath(graph.parent)
    real = {name: os.path.realpath(os.path.join(base, name)) for name in names}
    in_place = {name: os.path.normpath(os.path.join(base, name)) for name in names}
    if not graph.is_symlink() and real == in_place:
        return graph, None
    folder = os.path.commonpath([os.path.dirname(path) for path in real.values()] or [base])
    found = {name.encode(): os.path.relpath(path, folder).encode() for name, path in real.items()}
    data = graph.read_bytes()
    return _renamed(data, 0, len(data), "Model", found), Path(folder)


def _names(data: Buffer, start: int, end: int, kind: str, depth: int) -> Iterator[bytes]:
    """Yield the name of each external file in the message between two byte offsets."""
    if depth > _DEEPEST:
        raise _DamagedError("messages nested too deeply")
    inner = _FIELDS[kind]
    for number, wire, _, begin, stop in _fields(data, start, end):
        if wire != 2:
            continue
        if kind == "Node" and number == _OPERATOR and data[begin:stop] == b"EPContext":
            raise _DamagedError("the operator EPContext, which reads files that no manifest can vouch for")
        if inner.get(number) == "Entry":
            if (name := _location(data, begin, stop)) is not None:
                yield name
        elif number in inner:
            yield from _names(data, begin, stop, inner[number], depth + 1)


def _renamed(data: bytes, start: int, end: int, kind: str, names: Mapping[bytes, bytes]) -> bytes:
    """Return a message that `_names` has checked, with its external files renamed."""
    inner = _FIELDS[kind]
    parts: list[bytes] = []
    for number, wire, first, begin, stop in _fields(data, start, end):
        if wire != 2 or number not in inner:
            parts.append(data[first:stop])
            continue
        if inner[number] == "Entry":
            name = _location(data, begin, stop)
            value = data[begin:stop] if name is None else _packed(1, _LOCATION) + _packed(2, names[name])
        else:
            value = _renamed(data, begin, stop, inner[number], names)
        parts.append(_packed(number, value))
    return b"".join(parts)


def _location(data: Buffer, start: int, end: int) -> bytes | None:
    """Return the file name in an Entry with the key "location", else None. Of a repeated field, the last one counts."""
    found = {number: data[begin:stop] for number, wire, _, begin, stop in _fields(data, start, end) if wire == 2}
    return found.get(2, b"") if found.get(1) == _LOCATION else None


def _fields(data: Buffer, start: int, end: int) -> Iterator[Field]:
    """Yield the fields of a message in order."""
    place = start
    while place < end:
        first = place
        tag, place = _number(data, place, end)
        wire = tag & 7
        if wire == 2:
            length, begin = _number(data, place, end)
            place = begin + length
        elif wire == 0:
            begin = place
            _, place = _number(data, place, end)
        elif wire in (1, 5):
            begin = place
            place += 8 if wire == 1 else 4
        else:
            raise _DamagedError(f"no field of a protobuf message at byte {first}")
        if place > end or tag < 8:
            raise _DamagedError(f"no field of a protobuf message at byte {first}")
        yield tag >> 3, wire, first, begin, place


def _number(data: Buffer, place: int, end: int) -> tuple[int, int]:
    """Read a protobuf varint (seven bits per byte); return its value and the offset of the next byte."""
    value = shift = 0
    while place < end and shift < 64:
        byte = data[place]
        value |= (byte & 127) << shift
        place += 1
        if byte < 128:
            return value, place
        shift += 7
    raise _DamagedError(f"it ends in the middle of a field, at byte {place}")


def _packed(number: int, value: bytes) -> bytes:
    """Return an encoded length-delimited field with this value."""
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    written = bytearray()
    while number > 127:
        written.append(number & 127 | 128)
        number >>= 7
    written.append(number)
    return bytes(written)
