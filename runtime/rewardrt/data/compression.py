"""Compressed bytes: gzip with Python's own module, zstd with pyarrow's."""

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
    """A stream whose first bytes, `head`, can be inspected; reading the stream still starts with them."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._read = getattr(stream, "read1", stream.read)  # read1 does not wait for more bytes of a pipe
        head = b""
        while len(head) < _HEAD_BYTES and (more := self._read(_HEAD_BYTES - len(head))):
            head += more
            if head.endswith(b"\n"):  # on a terminal or a pipe the next line may take long to arrive
                break
        self.head = head
        self._left = head
        self.count = 0  # bytes read so far

    def readable(self) -> bool:
        """Return True: the stream is for reading."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, starting with the bytes in `head`."""
        data = self._left[: len(buffer)] or self._read(len(buffer))
        self._left = self._left[len(buffer) :]
        buffer[: len(data)] = data
        self.count += len(data)
        return len(data)

    def close(self) -> None:
        """Close the underlying stream."""
        if not self.closed:
            self._stream.close()
        super().close()


def unpacked(stream: Headed) -> io.BufferedReader:
    """Return the stream's bytes, decompressed if its first bytes are those of gzip or zstd."""
    buffered = cast(io.BufferedReader, io.BufferedReader(stream, 2**20))
    if stream.head.startswith(GZIP):
        return io.BufferedReader(_Members(buffered), 2**16)
    if stream.head.startswith(ZSTD):
        return io.BufferedReader(_Frames(buffered), 2**16)
    return buffered


class _Members(io.RawIOBase):
    """The members of a gzip file as one decompressed stream, up to any damage in the file."""

    _SLICE = 4096  # compressed bytes decoded at a time; a damaged slice is lost as a whole

    def __init__(self, packed: io.BufferedReader) -> None:
        self._packed, self._left, self._ready = packed, b"", b""
        self._member: Any = None

    def readable(self) -> bool:
        """Return True: the stream is for reading."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer. Raises EOFError or zlib.error if the file is truncated or damaged."""
        while not self._ready and self._more():
            pass
        data, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)

    def _more(self) -> bool:
        """Decompress one slice; return whether there was one."""
        self._left = self._left or self._packed.read(self._SLICE)
        if self._member is None:
            self._left = self._left.lstrip(b"\0")  # zeros may pad the space between members
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
    """The frames of a zstd file as one decompressed stream."""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed = import_pyarrow("a file packed with zstd").CompressedInputStream(packed, "zstd")

    def readable(self) -> bool:
        """Return True: the stream is for reading."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer."""
        data = self._packed.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def pack_gzip(data: bytes) -> bytes:
    """Return the bytes compressed as one member of a gzip file; equal bytes give equal members.

    A gzip file may consist of several members, one after the other.
    """
    return gzip.compress(data, mtime=0)


def pack_zstd(data: bytes) -> bytes:
    """Return the bytes compressed as one frame of a zstd file, which may consist of several frames."""
    return cast(bytes, import_pyarrow("a file packed with zstd").Codec("zstd").compress(data, asbytes=True))


@contextmanager
def reading(name: str, where: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turn errors in reading a file inside the block into a RewardRTError that names the file, and `where` in it."""
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
    """Return pyarrow, or raise MissingExtraError saying that `what` needs it."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise MissingExtraError(f"{what} needs pyarrow: pip install 'rewardrt[data]'") from error
    return pa
