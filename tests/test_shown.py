"""What the pages show is marked, and tests/shown.py finds what is not as it is shown, on small made-up pages."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

import shown
from shown_pages import MASKS, matches, pages, read_blocks

ROOT = Path(__file__).parent.parent


def run(folder: Path, text: str, update: bool = False, seconds: float = 20.0) -> shown.Counts:
    """Run a made-up page; `~~~` stands for a fence."""
    page = folder / "page.md"
    page.write_text(text.replace("~~~", "```"), encoding="utf-8")
    return shown.check(page, "page.md", folder / "exports", update, seconds)


@pytest.mark.parametrize("page", pages(ROOT), ids=lambda page: page.name)
def test_every_block_of_the_pages_is_marked(page: Path) -> None:
    _, errors = read_blocks(page.read_text(encoding="utf-8").split("\n"))
    assert [f"{page.name}:{error.line}: {error}" for error in errors] == []


def test_blocks_are_run_in_order_in_one_folder_and_counted(tmp_path: Path) -> None:
    counts = run(
        tmp_path,
        """
<!-- setup:
echo hidden > a
echo more >> a
-->
<!-- file: b/c.json -->
~~~json
{"d": 1}
~~~
An ordinary comment counts nothing: <!-- run of luck -->
<!-- a note -->

<!-- run -->
~~~console
$ cat a b/c.json
hidden
more
{"d": 1}
$ echo out; echo error >&2; printf "no newline"
out
error
no newline
$ ls models/tiny/config.json \\
  examples/answers.jsonl
examples/answers.jsonl
models/tiny/config.json
$ pwd
/home/me
$ test -e none
$ echo $?
1
~~~

1. In a list

   <!-- run, masked: seconds, rates -->
   ~~~console
   $ echo "took 0.1 s (12,345 tokens/s)"
   took 9.5 s (7 tokens/s)
   ~~~

<!-- run -->
~~~sh
echo not compared > e
test -e e
~~~

<!-- run -->
~~~python
text = open("e").read()
print(text.upper(), end="")
~~~

Text between.

<!-- output -->
~~~text
NOT COMPARED
~~~

<!-- run -->
~~~pycon
>>> len(text)
13
>>> for letter in "ab":
...     print(letter)
a
b
~~~

<!-- not run: needs a GPU -->
~~~console
$ nvidia-smi
~~~
<!-- not run: synopsis -->
~~~sh
rewardrt score BUNDLE
~~~
""",
    )
    assert counts.wrong == []
    assert (counts.run, counts.masked, counts.files) == (4, 1, 1)
    assert dict(counts.not_run) == {"needs a GPU": 1, "synopsis": 1}
    assert str(counts) == "run 4, masked 1, files 1, not run 2 (needs a GPU 1, synopsis 1), stale 0, failed 0"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("~~~console\n$ true\n~~~", 1, "a block without a mark"),
        ("<!-- run -->\n\n~~~console\n$ true\n~~~", 1, "`run` marks a block, which begins on the next line"),
        ("<!-- run -->", 1, "`run` marks a block, and there is none"),
        ("<!-- run -->\n~~~\n$ true\n~~~", 2, "a block without a language"),
        ("<!-- run -->\n~~~json\n{}\n~~~", 1, "a block in json cannot be run"),
        ("<!-- run -->\n~~~console\ntrue\n~~~", 3, "a console block begins with a command"),
        ("<!-- run -->\n~~~console\n$ true", 2, "a block that does not end"),
        ("<!-- run, quickly -->\n~~~sh\ntrue\n~~~", 1, "a mark that is not understood: run, quickly"),
        ("<!-- not run -->\n~~~sh\ntrue\n~~~", 1, "a mark that is not understood: not run"),
        ("<!-- run, masked: colours -->\n~~~sh\ntrue\n~~~", 1, "no mask is called colours; there are dates, "),
        ("<!-- file, masked: seconds: a -->\n~~~text\n1 s\n~~~", 1, "`file` has neither masks nor a background"),
        ("<!-- run, in the background -->\n~~~sh\ntrue\n~~~", 1, "a console block of one command"),
        ("<!-- output -->\n~~~text\n~~~", 1, "`output` is what the python block above it prints"),
        ("<!-- run -->\n~~~pycon\n>>> 1/0\nTraceback (most recent call last):\n  ...\nE: e\n~~~", 3, "an exception is"),
        ("<!-- run, masked: seconds -->\n~~~sh\ntrue\n~~~", 1, "stale mask: seconds"),
        ("<!-- run, masked: dates -->\n~~~console\n$ echo 1 s\n1 s\n~~~", 1, "stale mask: dates"),
        ("<!-- run, masked: sizes, numbers -->\n~~~console\n$ echo 1 MB\n1 MB\n~~~", 1, "stale mask: numbers"),
        (
            "<!-- run -->\n~~~console\n$ echo a\nb\n~~~",
            3,
            "prints something else than what is shown\n--- shown\n+++ printed",
        ),
        ("<!-- run -->\n~~~console\n$ echo a\na\nb\n~~~", 3, "prints something else"),
        ("<!-- run -->\n~~~console\n$ echo a\n~~~", 3, "prints something else"),
        ("<!-- run, masked: seconds -->\n~~~console\n$ echo a 1 s\nb 2 s\n~~~", 3, "prints something else"),
        ("<!-- run -->\n~~~console\n$ echo a; exit 3\na\n~~~", 3, "ends with 3, and the page does not show that"),
        ("<!-- run -->\n~~~console\n$ false\n$ true\n~~~", 3, "ends with 1, and the page does not show that"),
        ("<!-- run -->\n~~~console\n$ true\n$ echo $?\n2\n~~~", 4, "prints something else"),
        ("<!-- run -->\n~~~console\n$ exit 0\n$ true\n~~~", 1, "ends before its last command"),
        ("<!-- run -->\n~~~sh\ntrue\nfalse\ntrue\n~~~", 1, "ends with 1: true"),
        ("<!-- setup: false -->", 1, "ends with 1: false"),
        ("<!-- file: models -->\n~~~text\n~~~", 1, "models is there already"),
        ("<!-- run -->\n~~~python\nprint(1)\n~~~", 3, "prints something else"),
        ("<!-- run -->\n~~~python\n1 / 0\n~~~", 3, "the code fails\nTraceback"),
        ("<!-- run -->\n~~~python\nimport os\nos._exit(3)\n~~~", 3, "the code ended Python"),
        ("<!-- run -->\n~~~pycon\n>>> 1 + 1\n3\n~~~", 3, "prints something else"),
        ("<!-- setup, in the background: sleep 9 -->", 1, "neither a `--port` nor output"),
        ("<!-- setup, in the background: exit 3 # --port 1 -->", 1, "ended, or was not ready"),
    ],
)
def test_a_page_that_is_not_as_it_shows_is_found(tmp_path: Path, text: str, line: int, message: str) -> None:
    counts = run(tmp_path, text)
    assert counts.wrong[0].startswith(f"page.md:{line}: ")
    assert message in counts.wrong[0]
    assert len(counts.stale) == ("stale" in message)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("<!-- run -->\n~~~console\n$ sleep 60 & sleep 60\n~~~", 1),
        ("<!-- run -->\n~~~sh\nsleep 60\n~~~", 1),
        ("<!-- run -->\n~~~python\nimport time; time.sleep(60)\n~~~", 3),
        ("<!-- setup: sleep 60 -->", 1),
        ("<!-- setup, in the background: sleep 60 # --port 1 -->", 1),
    ],
)
def test_a_block_has_a_limit_of_time(tmp_path: Path, text: str, line: int) -> None:
    began = time.monotonic()
    counts = run(tmp_path, text, seconds=0.5)
    assert counts.wrong[0].startswith(f"page.md:{line}: ")
    assert "0.5 s" in counts.wrong[0]
    assert time.monotonic() - began < 20


def test_a_server_runs_until_the_page_ends_at_a_port_of_its_own(tmp_path: Path) -> None:
    """Two pages of one port at a time; the second's command is shown with what it prints. Both servers are killed."""
    serve = f"echo $$ > {tmp_path}/pid; set -- --port 5000; exec {sys.executable} -m http.server --bind 127.0.0.1 $2"
    hidden = f"<!-- setup, in the background: {serve} -->"
    ask = """
<!-- setup: echo found > page -->
<!-- run -->
~~~console
$ echo http://127.0.0.1:5000/page 5000
http://127.0.0.1:5000/page 5000
~~~
<!-- run -->
~~~python
from urllib.request import urlopen
assert urlopen("http://127.0.0.1:5000/page").read() == b"found\\n"
~~~
"""
    first = run(tmp_path, hidden + ask)
    assert first.wrong == []
    pids = [int((tmp_path / "pid").read_text())]
    shown_too = f"""
<!-- run, in the background -->
~~~console
$ echo at http://127.0.0.1:5000; {serve}
at http://127.0.0.1:5000
...
~~~
"""
    second = run(tmp_path, shown_too + ask)
    assert second.wrong == []
    pids.append(int((tmp_path / "pid").read_text()))
    assert len(set(pids)) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, signal.SIG_DFL)


def test_update_writes_what_came_where_it_differs(tmp_path: Path) -> None:
    text = """
<!-- run, masked: seconds -->
~~~console
$ echo took 1 s
took 2 s
$ echo more
less
and less
$ true
$ echo new
~~~
- <!-- run -->
  ~~~pycon
  >>> 1 + 1
  3
  ~~~
<!-- run -->
~~~python
print("a\\n\\nb")
~~~
<!-- output -->
~~~text
~~~
"""
    # The mark of a list's block stands on a line of its own.
    text = text.replace("- <!-- run -->", "- item\n\n  <!-- run -->")
    counts = run(tmp_path, text, update=True)
    assert counts.wrong == []
    expected = text.replace("less\nand less", "more").replace("echo new", "echo new\nnew").replace("  3\n", "  2\n")
    expected = expected.replace("~~~text\n", "~~~text\na\n\nb\n")
    written = (tmp_path / "page.md").read_text()
    assert written == expected.replace("~~~", "```")
    assert run(tmp_path, written).wrong == []


def test_update_leaves_to_people_what_it_cannot_write(tmp_path: Path) -> None:
    text = """
<!-- run -->
~~~console
$ seq 5
1
...
6
~~~
<!-- run, masked: dates -->
~~~console
$ echo now
2026-01-01
~~~
<!-- run -->
~~~python
print(1)
~~~
"""
    counts = run(tmp_path, text, update=True)
    assert [re.sub(r"\n.*", "", wrong, flags=re.DOTALL) for wrong in counts.wrong] == [
        "page.md:9: stale mask: dates hides nothing of what is shown",
        "page.md:4: prints something else than what is shown",
        "page.md:16: prints something else than what is shown",
    ]
    assert (tmp_path / "page.md").read_text() == text.replace("~~~", "```").replace("2026-01-01", "now")


@pytest.mark.parametrize(
    ("wanted", "found", "same"),
    [
        ("a\n...\nd", "a\nb\nc\nd", True),
        ("a\n...\nd", "a\nd", True),
        ("a\n...\nd", "a\nb\nc", False),
        ("a\n...", "a\nb", True),
        ("...\nb\n...\nd", "a\nb\nc\nd", True),
        ("...\nc\n...\nb\n...", "a\nb\nc\nd", False),
        ("a\n...\na", "a", False),
        ("a\n  ...\nc", "a\nb\nc", True),
        ("a...", "ab", False),
    ],
)
def test_a_line_of_dots_stands_for_any_lines(wanted: str, found: str, same: bool) -> None:
    assert matches(wanted.split("\n"), found.split("\n"), ()) == same


@pytest.mark.parametrize(
    ("name", "wanted", "found", "other"),
    [
        ("dates", "at 2026-11-30T16:32:52+00:00", "at 2027-01-01T00:00:00Z", "at 16"),
        ("hashes", "sha256 18ff1073206b2acb", "sha256 28ff1073206b2acb3deb", "sha256 none"),
        ("paths", "in /tmp/a.b/c", "in /home/d", "in c"),
        ("versions", "torch 2.13.0+cpu, onnx 1.2.3", "torch 2.14.1, onnx 1.2.3rc1", "torch 2.13, onnx 1.2.3"),
        ("rates", "(12,345 tokens/s)", "(7 tokens/s)", "(7 texts/s)"),
        ("sizes", "  7,093,248  model.onnx\n12 MiB", "      9,248  model.onnx\n7.5 MiB", "  1  model\n7.5 MiB"),
        ("seconds", "in 0.1 s and 12 ms", "in   9.25 s and 3 ms", "in 0.1 s and 12 m"),
        ("machine", "2 cores, avx512_vnni", "16 cores, avx2", "2 scores, avx512_vnni"),
        ("differences", "1.5e-06 std", "2.62e-07 std", "1.5 std"),
        ("rounding", '{"reward": -3.0293376}', '{"reward": -3.02933}', '{"reward": -3.0299}'),
        ("rounding", "0.0139311645 a", "0.0139311 a", "0.0139311 b"),
        ("numbers", "a  1,234 -2.5 3e-7", "a 5 7 -1", "a 5 7"),
    ],
)
def test_a_mask_hides_its_own_and_nothing_else(name: str, wanted: str, found: str, other: str) -> None:
    assert MASKS[name].search(wanted)
    assert not matches(wanted.split("\n"), found.split("\n"), ())
    assert matches(wanted.split("\n"), found.split("\n"), (name,))
    assert not matches(wanted.split("\n"), other.split("\n"), (name,))


def test_models_tiny_is_exported_once_for_all_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that stands for rewardrt counts its calls."""
    command = tmp_path / "bin" / "rewardrt"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nmkdir -p $3 && echo $4 > $3/reward.json\n')
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(command.parent / "python"))
    (tmp_path / "exports").mkdir()
    page = """
<!-- setup: rewardrt export models/tiny bundle -->
<!-- setup: rewardrt export models/tiny a/other --token-rewards -->
<!-- run -->
~~~console
$ cat bundle/reward.json a/other/reward.json

--token-rewards
~~~
"""
    for _ in range(2):
        assert run(tmp_path, page).wrong == []
    assert len((tmp_path / "calls").read_text().splitlines()) == 2
