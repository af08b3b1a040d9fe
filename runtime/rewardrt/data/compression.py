"""Bytes that were packed: gzip with Python's own module, zstd with pyarrow's."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from rewardrt.errors import MissingExtraError, RewardRTError

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_HEAD_BYTES = 64


class Headed(io.RawIOBase):
    """A stream that can be looked at: its first bytes are in `head`, and are read again."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._read = getattr(stream, "read1", stream.read)  # what is there already, of a pipe
        head = b""
        while len(head) < _HEAD_BYTES and (more := self._read(_HEAD_BYTES - len(head))):
            head += more
            if head.endswith(b"\n"):  # a terminal, or a pipe: the next line may be long in coming
                break
        self.head = head
        self._left = head
        self.count = 0  # bytes that were read on

    def readable(self) -> bool:
        """Return True: it is for reading."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, first with the bytes that were looked at."""
        data = self._left[: len(buffer)] or self._read(len(buffer))
        self._left = self._left[len(buffer) :]
        buffer[: len(data)] = data
        self.count += len(data)
        return len(data)

    def close(self) -> None:
        """Close the stream below."""
        if not self.closed:
            self._stream.close()
        super().close()


def unpacked(stream: Headed) -> io.BufferedReader:
    """Return the stream's bytes, unpacked if its first bytes say that they are packed."""
    buffered = cast(io.BufferedReader, io.BufferedReader(stream, 2**20))
    if stream.head.startswith(GZIP):
        return io.BufferedReader(_Members(buffered), 2**16)
    if stream.head.startswith(ZSTD):
        return io.BufferedReader(_Frames(buffered), 2**16)
    return buffered


class _Members(io.RawIOBase):
    """Packed members of gzip, one after the other, as one stream: all that can be unpacked before what is damaged."""

    _SLICE = 4096  # packed bytes: what is unpacked of a slice with damage in it is lost

    def __init__(self, packed: io.BufferedReader) -> None:
        self._packed, self._left, self._ready = packed, b"", b""
        self._member: Any = None

    def readable(self) -> bool:
        """Return True: it is for reading."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer. Raises EOFError and zlib.error where the file is cut short or damaged."""
        while not self._ready and self._more():
            pass
        data, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)

    def _more(self) -> bool:
        """Unpack a slice; returns whether there was one."""
        self._left = self._left or self._packed.read(self._SLICE)
        if self._member is None:
            self._left = self._left.lstrip(b"\0")  # members may be padded
            self._member = zlib.decompressobj(zlib.MAX_WBITS | 16) if self._left else None
        if not self._left:
            if self._member is not None:
                raise EOFError("it ends within what is packed")
            return bool(self._packed.peek(1))
        self._ready = self._member.decompress(self._left)
        self._left = self._member.unused_data
        if self._member.eof:
            self._member = None
        return True


class _Frames(io.RawIOBase):
    """Packed frames of zstd, one after the other, as one stream."""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed = import_pyarrow("a file packed with zstd").CompressedInputStream(packed, "zstd")

    def readable(self) -> bool:
        """Return True: it is for reading."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer."""
        data = self._packed.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def pack_gzip(data: bytes) -> bytes:
    """Return one member of a gzip file; members follow each other, and the same bytes give the same member."""
    return gzip.compress(data, mtime=0)


def pack_zstd(data: bytes) -> bytes:
    """Return one frame of a zstd file; frames follow each other."""
    return cast(bytes, import_pyarrow("a file packed with zstd").Codec("zstd").compress(data, asbytes=True))


@contextmanager
def reading(name: str, where: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Make what is wrong with a file that is read a RewardRTError that names it, and `where` it is."""
    try:
        yield
    except RewardRTError:
        raise
    except (EOFError, zlib.error, OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RewardRTError(
            f"{name}: cannot be read{where()} ({' '.join(reason.split())[:200]}); is the file whole?"
        ) from error


def import_pyarrow(what: str) -> Any:
    """Return pyarrow, or raise MissingExtraError saying what needs it."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise MissingExtraError(f"{what} needs pyarrow: pip install 'rewardrt[data]'") from error
    return pa
