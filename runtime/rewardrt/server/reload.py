"""A new bundle without a restart: loaded beside the old one, tried, and put in its place."""

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
    """Loads the bundles of a server anew from their folders, one reload at a time.

    Each request is answered by the bundles that were there when it began. A bundle that cannot be loaded, or that does
    not give a golden text its reward, changes nothing.
    """

    def __init__(self, models: Models, loader: Loader, count: Callable[[str], None]) -> None:
        self._models = models
        self._loader = loader
        self._count = count
        self._one = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def reload(self) -> list[dict[str, Any]]:
        """Load every bundle anew; returns what is served now. Raises Problem. Goes on when nobody waits for it."""
        task = asyncio.ensure_future(self._reload())
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def start(self) -> None:
        """Begin a reload that nobody waits for."""
        task = asyncio.ensure_future(self._reload())
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # what went wrong has been logged

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
        """End the engines of old bundles when the last request that may use them is answered."""
        async with self._one:  # the next reload waits: at most two of each bundle are in memory
            while uses.count:
                await asyncio.sleep(0.02)
            for served in old:
                served.engine.close()
            for served in old:
                await _in_thread(partial(served.engine.join, 30.0))
            old.clear()
            await _in_thread(_free)


def _free() -> None:
    """Give memory back that old bundles had: else what was freed in between keeps pages of the process."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


async def _in_thread(work: Callable[[], Any]) -> Any:
    """Do something in a thread that does not hold up the end of the process."""
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
        except BaseException as error:  # it is raised where the result is waited for
            failed = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, value, failed)

    threading.Thread(target=run, name="rewardrt-reload", daemon=True).start()
    return await done
