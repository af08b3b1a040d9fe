"""Engines that are kept: whole or not at all, one process building, and a folder that cannot be written named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rewardrt.machine import engine_cache
from rewardrt.machine.engine_cache import CONTENTS, RUNTIME, VARIABLE, CacheError, Entry, Key, holds, root

KEY = Key((("gpu", "a GPU"), ("identity", "abc"), ("version", "1.7.1")))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def builder(counted: list[Path], content: bytes = b"engine") -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        counted.append(folder)
        (folder / "engine.onnx").write_bytes(content)
        (folder / "weights").mkdir()
        (folder / "weights" / "engine.bin").write_bytes(content * 100)

    return build


def test_an_engine_is_built_once_and_lies_there_whole(cache: Path) -> None:
    entry, built = Entry.of(KEY), []
    assert not entry.is_there() and not entry.is_whole() and not holds("abc")
    for _ in range(3):
        entry.obtain(KEY, builder(built))
    assert len(built) == 1 and entry.is_there() and entry.is_whole() and holds("abc") and not holds("abd")
    contents = json.loads((entry.folder / CONTENTS).read_text())
    assert contents["made_for"] == dict(KEY.parts)
    assert list(contents["files"]) == ["engine.onnx", "weights/engine.bin"]
    assert sorted(path.name for path in cache.iterdir()) == [KEY.name, f"{KEY.name}.lock"]
    assert cache.stat().st_mode & 0o077 == 0  # an engine is code: nobody else may write one


def test_each_gpu_driver_and_version_has_an_engine_of_its_own(cache: Path) -> None:
    others = [Key((*KEY.parts[:2], ("version", "1.8"))), Key((("gpu", "another"), *KEY.parts[1:]))]
    assert len({key.name for key in (KEY, *others)}) == 3
    Entry.of(KEY).obtain(KEY, builder([]))
    assert not any(Entry.of(key).is_there() for key in others)


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "no list", "a list of nothing", "not a list"])
def test_a_damaged_engine_is_built_anew_with_a_word(cache: Path, damage: str) -> None:
    entry, built, said = Entry.of(KEY), [], []
    entry.obtain(KEY, builder(built))
    engine, contents = entry.folder / "weights" / "engine.bin", entry.folder / CONTENTS
    if damage == "changed":
        engine.write_bytes(b"x" * engine.stat().st_size)
    elif damage == "cut":
        engine.write_bytes(b"")
    elif damage == "gone":
        engine.unlink()
    elif damage == "no list":
        contents.unlink()
    else:
        contents.write_text('{"files": {}}' if damage == "a list of nothing" else "[1]")
    assert not entry.is_whole()
    entry.obtain(KEY, builder(built), said.append)
    assert len(built) == 2 and entry.is_whole()
    assert said == [f"{entry.folder}: not whole, or changed; the engine is built anew"]


def test_what_a_provider_adds_while_it_runs_is_no_damage(cache: Path) -> None:
    entry = Entry.of(KEY)
    entry.obtain(KEY, builder([]))
    (entry.folder / RUNTIME).mkdir()
    (entry.folder / RUNTIME / "kernels").write_bytes(b"anything")
    assert entry.is_whole()


def test_a_build_that_fails_leaves_nothing_and_its_error_is_its_own(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"an engine")
        raise ValueError("the GPU is too small")

    with pytest.raises(ValueError, match="the GPU is too small"):
        Entry.of(KEY).obtain(KEY, fail)
    assert [path.name for path in cache.iterdir()] == [f"{KEY.name}.lock"]
    Entry.of(KEY).obtain(KEY, builder([]))  # the lock was given back


@pytest.mark.parametrize("place", ["/proc/rewardrt", "/dev/null/rewardrt"])
def test_a_folder_that_cannot_be_written_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv(VARIABLE, place)
    with pytest.raises(
        CacheError, match=rf"^{place}: engines cannot be kept there \(.+\); name another folder by"
    ) as caught:
        Entry.of(KEY).obtain(KEY, builder([]))
    assert "\n" not in str(caught.value)
    assert not holds("abc")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="asks for a disk that is full")
def test_a_full_disk_is_named_even_where_a_library_does_not_say_so(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        return write(Path("/dev/full"), data)

    def build(folder: Path) -> None:
        raise RuntimeError("engine could not be serialized")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CacheError, match=r"engines cannot be kept there \(No space left on device\)"):
        Entry.of(KEY).obtain(KEY, build)


def test_a_cache_that_is_read_only_gives_what_it_holds(cache: Path) -> None:
    entry, built = Entry.of(KEY), []
    entry.obtain(KEY, builder(built))
    cache.chmod(0o500)
    try:
        entry.obtain(KEY, builder(built))
    finally:
        cache.chmod(0o700)
    assert len(built) == 1


WARM = """
import sys, time
from pathlib import Path
from rewardrt.machine.engine_cache import Entry, Key
key = Key((("gpu", "a GPU"), ("identity", "abc"), ("version", "1.7.1")))
def build(folder):
    print("builds", flush=True)
    while not Path(sys.argv[1]).exists():
        time.sleep(0.02)
    (folder / "engine.onnx").write_bytes(b"engine")
Entry.of(key).obtain(key, build, lambda line: print(line, flush=True))
print("has it", Entry.of(key).is_whole())
"""


def start(go: Path) -> subprocess.Popen[str]:
    """A process that builds for as long as a file is not there."""
    return subprocess.Popen([sys.executable, "-c", WARM, str(go)], stdout=subprocess.PIPE, text=True)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_of_two_processes_one_builds_and_the_other_waits_for_it(cache: Path, tmp_path: Path) -> None:
    first = start(tmp_path / "go")
    assert line(first) == "builds"
    second = start(tmp_path / "go")
    assert line(second) == "another process is building this engine; waiting for it"
    (tmp_path / "go").touch()
    assert [process.communicate(timeout=60)[0] for process in (first, second)] == ["has it True\n"] * 2


def test_a_process_that_is_killed_while_it_builds_gives_its_lock_back(cache: Path, tmp_path: Path) -> None:
    first = start(tmp_path / "never")
    assert line(first) == "builds"
    first.kill()
    first.communicate(timeout=60)
    assert start(tmp_path).communicate(timeout=60)[0] == "builds\nhas it True\n"


def test_a_lock_that_is_never_given_back_is_no_waiting_for_ever(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_cache, "WAIT_SECONDS", 0.3)
    first = start(tmp_path / "never")
    try:
        assert line(first) == "builds"
        begun = time.monotonic()
        with pytest.raises(CacheError, match=r"another process has had .* for 0\.3 s"):
            Entry.of(KEY).obtain(KEY, builder([]))
        assert time.monotonic() - begun < 20
    finally:
        first.kill()
        first.communicate(timeout=60)


def test_threads_of_one_process_build_once(cache: Path) -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        time.sleep(0.2)
        builder(built)(folder)

    threads = [threading.Thread(target=Entry.of(KEY).obtain, args=(KEY, build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(built) == 1


def test_the_folder_is_the_users_cache_unless_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/users/cache")
    assert root() == Path("/users/cache/rewardrt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert root() == Path("/home/somebody/.cache/rewardrt")
    monkeypatch.setenv(VARIABLE, "/elsewhere")
    assert root() == Path("/elsewhere")
