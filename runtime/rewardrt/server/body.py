"""A request's body: read in bounded time and memory, decompressed, and decoded within limits.

The memory for large bodies is reserved before it is used, so that the total stays bounded however many requests arrive
at once.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from rewardrt.data.strict_json import Bounds, TooManyValuesError, read_json
from rewardrt.errors import RowError
from rewardrt.server.options import ServerOptions
from rewardrt.server.problem import Problem, too_many

SMALL_BODY = 65_536  # bytes; a body up to this size needs no reservation and may be decoded on the event loop
SMALL_STRUCTURE = 512  # commas and brackets of such a body; each may be a value that takes a microsecond or more
BUDGET_BODIES = 4  # number of bodies of the largest size in memory at once
NODES_OF_AN_ITEM, NUMBERS_OF_AN_ITEM = 128, 1024
ENCODINGS = {"gzip": 31, "x-gzip": 31, "deflate": 47}  # window bits for zlib
CHUNK = 65_536
# Lists in a body that belong to one text, however long. Where `messages` is a list of texts, the protocol counts them.
NOT_TEXTS = frozenset({"messages", "prompt", "tools", "label"})

Receive = Callable[[], Awaitable[Any]]


class ClientGoneError(Exception):
    """The client closed its connection before it got an answer."""


class Budget:
    """The memory for bodies and answers of all requests; several requests of one client get at most half of it."""

    def __init__(self, total: int) -> None:
        self._total = self._free = total
        self._held: Counter[str] = Counter()
        self._waiting: list[tuple[str, int, asyncio.Future[None]]] = []

    async def take(self, client: str, size: int) -> None:
        """Wait until this many bytes are free for this client, and reserve them."""
        size = min(size, self._total)
        if self._fits(client, size):
            self._book(client, size)
            return
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (client, size, ready)
        self._waiting.append(entry)
        try:
            await ready
        except BaseException:
            if ready.done() and not ready.cancelled():
                self.give(client, size)
            else:
                self._waiting.remove(entry)
            raise

    def give(self, client: str, size: int) -> None:
        """Release reserved bytes, and give them to waiting requests."""
        size = min(size, self._total)
        self._free += size
        self._held[client] -= size
        if not self._held[client]:
            del self._held[client]
        for entry in list(self._waiting):
            if not entry[2].done() and self._fits(entry[0], entry[1]):
                self._waiting.remove(entry)
                self._book(entry[0], entry[1])
                entry[2].set_result(None)

    def _fits(self, client: str, size: int) -> bool:
        held = self._held.get(client, 0)
        return size <= self._free and (not held or held + size <= self._total // 2)

    def _book(self, client: str, size: int) -> None:
        self._free -= size
        self._held[client] += size


class Lease:
    """The part of the budget that one request has reserved."""

    def __init__(self, budget: Budget, client: str) -> None:
        self._budget = budget
        self._client = client
        self.size = 0

    async def change(self, size: int) -> None:
        """Replace the reservation by one of `size` bytes; small sizes need none."""
        self.release()
        if size > SMALL_BODY:
            await self._budget.take(self._client, size)
            self.size = size

    def release(self) -> None:
        """Release the reservation."""
        if self.size:
            self._budget.give(self._client, self.size)
            self.size = 0


async def read_body(receive: Receive, headers: Mapping[str, str], options: ServerOptions, lease: Lease) -> bytes:
    """Return the bytes of a body as sent. Raises Problem and ClientGoneError."""
    limit = options.max_body_bytes
    length = headers.get("content-length", "")
    expected = int(length) if length.isascii() and length.isdigit() and len(length) < 20 else None
    if expected is not None and expected > limit:
        raise too_large(limit)
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", *ENCODINGS):
        raise Problem("media_type", f"content-encoding: expected identity, gzip or deflate, found {encoding[:40]}")
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(options.body_seconds):
            while True:
                event = await receive()
                if event["type"] == "http.disconnect":
                    raise ClientGoneError
                part: bytes = event.get("body", b"")
                size += len(part)
                if size > limit:
                    raise too_large(limit)
                parts.append(part)
                if not event.get("more_body", False):
                    break
                if size > SMALL_BODY and not lease.size:
                    await lease.change(expected if expected is not None and encoding == "identity" else limit)
    except TimeoutError:
        if lease.size or size <= SMALL_BODY:
            message = f"the body did not come within {options.body_seconds:g} seconds"
            raise Problem("timeout", message) from None
        raise Problem("overloaded", "too many large bodies at once; try again later", retry_after=1) from None
    if encoding != "identity" and not lease.size:
        await _waited(lease.change(limit), options.body_seconds)
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def _waited(work: Awaitable[None], seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await work
    except TimeoutError:
        raise Problem("overloaded", "too many large bodies at once; try again later", retry_after=1) from None


async def hold(lease: Lease, size: int, seconds: float) -> None:
    """Change a request's reservation; raise Problem("overloaded") if the memory is not free in time."""
    await _waited(lease.change(size), seconds)


def too_large(limit: int) -> Problem:
    """Return the problem of a body over the limit."""
    return Problem("too_large", f"the body is over the limit of {limit} bytes; send fewer texts at a time")


def unpack(data: bytes, headers: Mapping[str, str], limit: int) -> bytes:
    """Return a body decoded from its content-encoding, without ever decompressing more than `limit` bytes."""
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding == "identity":
        return data
    parts: list[bytes] = []
    size = 0
    unpacker = zlib.decompressobj(ENCODINGS[encoding])
    try:
        for start in range(0, len(data), CHUNK):  # in small pieces, because zlib copies the remainder each time
            some = data[start : start + CHUNK]
            while some:
                if unpacker.eof:  # gzip data may have several members
                    unpacker = zlib.decompressobj(ENCODINGS[encoding])
                part = unpacker.decompress(some, CHUNK)
                some = unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail
                size += len(part)
                if size > limit:
                    raise too_large(limit)
                parts.append(part)
        while not unpacker.eof and (part := unpacker.decompress(b"", CHUNK)):
            size += len(part)
            if size > limit:
                raise too_large(limit)
            parts.append(part)
    except zlib.error:
        raise Problem("validation", f"content-encoding: the body is not {encoding}") from None
    if not unpacker.eof:
        raise Problem("validation", f"content-encoding: the {encoding} data ends too early")
    return b"".join(parts)


def is_small(data: bytes) -> bool:
    """Whether a body is so small that handling it in a thread would cost more."""
    return len(data) <= SMALL_BODY and sum(map(data.count, (b",", b"[", b"{"))) <= SMALL_STRUCTURE


def decode(data: bytes, options: ServerOptions) -> Any:
    """Return the JSON of a body; raise Problem if it is not JSON, or larger than a request of any protocol."""
    bounds = None
    if len(data) > SMALL_BODY:
        bounds = Bounds(options.max_items * NODES_OF_AN_ITEM, options.max_items * NUMBERS_OF_AN_ITEM)
    try:
        return read_json(data, bounds)
    except TooManyValuesError as error:
        raise Problem("too_many", f"body: {error}") from None
    except RowError as error:
        raise Problem("validation", f"body: {error}") from None


def check_counts(body: Any, most: int) -> None:
    """Raise Problem for a list of more texts than a request may have, before its items are examined."""
    if not isinstance(body, dict):
        return
    for name, value in body.items():
        if isinstance(value, list) and len(value) > most and name not in NOT_TEXTS:
            if value and isinstance(value[0], int):  # one text as token ids
                continue
            raise too_many(len(value), most)
