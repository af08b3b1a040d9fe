"""Reload bundles without a restart: load the new one while the old one serves, test it, and swap them."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from rewardrt.errors import RewardRTError
from rewardrt.server.isolation import place
from rewardrt.server.log import log
from rewardrt.server.models import Loader, Models, Served, Uses
from rewardrt.server.problem import Problem


class Reloader:
    """Reloads the bundles of a server from their folders, one reload at a time.

    Each request is answered by the bundles that were served when it began. If a bundle cannot be loaded, or a golden
    text does not get its reward, nothing changes.
    """

    def __init__(self, models: Models, loader: Loader, count: Callable[[str], None]) -> None:
        self._models = models
        self._loader = loader
        self._count = count
        self._one = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def reload(self) -> list[dict[str, Any]]:
        """Reload every bundle; return what is served now.

        Raises Problem. The reload continues if the caller is cancelled.
        """
        task = asyncio.ensure_future(self._reload())
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def start(self) -> None:
        """Start a reload in the background."""
        task = asyncio.ensure_future(self._reload())
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # mark it as retrieved; it was logged

    async def _reload(self) -> list[dict[str, Any]]:
        async with self._one:
            started = time.perf_counter()
            old = self._models.each
            new: dict[str, Served] = {}
            try:
                for served in old:
                    new[served.name] = await _in_thread(
                        partial(self._loader.load, served.name, served.path, check=True)
                    )
            except Exception as error:
                for served in new.values():
                    served.engine.close()
                known = isinstance(error, RewardRTError)
                reason = str(error) if known else f"{type(error).__name__} at {place(error)}"
                self._count("failed")
                log(f"error: the bundles were not loaded anew, the old ones are served on: {reason}"[:2000])
                raise Problem("backend", f"not loaded anew, the old bundles are served on: {reason}") from error
            uses = self._models.replace(new)
            self._count("loaded")
            seconds = time.perf_counter() - started
            for served in new.values():
                log(f"loaded anew in {seconds:.2f} s: {served.name}, sha256 {served.sha256}")
            answer = [{"name": served.name, "sha256": served.sha256, "seconds": seconds} for served in new.values()]
            self._retire(old, uses)
            return answer

    def _retire(self, old: list[Served], uses: Uses) -> None:
        task = asyncio.ensure_future(self._end(old, uses))
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def _end(self, old: list[Served], uses: Uses) -> None:
        """End the engines of old bundles when the last request that may use them has been answered."""
        async with self._one:  # the next reload waits, so at most two copies of a bundle are in memory
            while uses.count:
                await asyncio.sleep(0.02)
            for served in old:
                served.engine.close()
            for served in old:
                await _in_thread(partial(served.engine.join, 30.0))
            old.clear()
            await _in_thread(_free)


def _free() -> None:
    """Return the memory of old bundles to the system; otherwise fragmentation would keep its pages in the process."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)


async def _in_thread(work: Callable[[], Any]) -> Any:
    """Run work in a thread that does not delay the end of the process."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(value)
        else:
            done.set_exception(error)

    def run() -> None:
        value, failed = None, None
        try:
            value = work()
        except BaseException as error:  # raised again where the result is awaited
            failed = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, value, failed)

    threading.Thread(target=run, name="rewardrt-reload", daemon=True).start()
    return await done
