"""The blocks of a page and their marks: what is run, what of it is compared, and what is not run and why.

A mark is an HTML comment on the line above a block's fence, which readers do not see:

    <!-- run -->                            run; what it prints is what the page shows
    <!-- run, masked: seconds, hashes -->   the same, but for the parts that these masks hide on both sides
    <!-- run, in the background -->         one command that is left running, such as a server's, until the page ends
    <!-- not run: REASON -->
    <!-- file: NAME -->                     written to a file that later blocks read
    <!-- output -->                         what the python block above prints
    <!-- setup: COMMANDS -->                run and not shown: no block follows; it may have several lines
    <!-- setup, in the background: COMMAND -->
"""

from __future__ import annotations

import doctest
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

RUNNABLE = ("console", "sh", "python", "pycon")
ROUNDING = "rounding"  # the one mask that still compares: numbers of five decimals or more are equal to within 1e-4
_REAL = re.compile(r"-?\d+\.\d{5,}(?:e[+-]?\d+)?")
_REAL_TOLERANCE = {"rel_tol": 1e-4, "abs_tol": 1e-5}

# In the order in which they are applied. What stands before a number to fill a column is hidden with it.
MASKS = {
    name: re.compile(pattern, re.MULTILINE)
    for name, pattern in {
        "dates": r"\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:\d\d)?)?",
        "hashes": r"\b[0-9a-f]{12,64}\b",
        "paths": r"(?<![\w:/.])/(?:[\w.@+-]+/)*[\w.@+-]+",
        "versions": r"\b\d+\.\d+\.\d+(?:[.+-]?[a-z]+[\w.]*)?",
        "rates": r" *\b\d[\d,.]*(?= \w+/s\b)",
        "sizes": r" *\b\d[\d,.]*(?= (?:bytes|[kKMGT]i?B)\b)|^ *\d[\d,]*(?=  \S+$)",
        "seconds": r" *\b\d[\d,.]*(?= (?:µs|us|ms|s|min)\b)",
        "machine": r"\b\d+ cores?\b|\b(?:avx\w*|AVX-?\w*|amx\w*|AMX|VNNI|neon|x86[-_]64|aarch64|arm64)\b",
        "differences": r"\b\d(?:\.\d+)?e-\d+",  # of rounding, which another processor does otherwise
        ROUNDING: _REAL.pattern,
        "numbers": r" *-?\b\d[\d,.]*(?:e[+-]?\d+)?",
    }.items()
}

_FENCE = re.compile(r"(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<language>.*)")
_COMMENT = re.compile(r"<!--\s*(?P<text>.*?)\s*-->", re.DOTALL)
_MARK = re.compile(
    r"(?P<kind>run|setup|not run|file|output)(?P<background>, in the background)?"
    r"(?:, masked: (?P<masks>[^:]+))?(?::\s*(?P<argument>.+))?",
    re.DOTALL,
)
_NEEDS_ARGUMENT = ("setup", "not run", "file")


class PageError(Exception):
    """A block or a mark that the page may not have, or that did not do what the page shows."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


class StaleMaskError(PageError):
    """A mask that hides nothing of what is shown."""


@dataclass(frozen=True)
class Step:
    """A command or lines of Python, and what the page shows that they print.

    `line` is that of the code, from 1; what is shown are the page's lines `start` to `stop`, from 0.
    """

    code: str
    line: int
    shown: tuple[str, ...]
    start: int
    stop: int
    indent: str = ""
    has_place: bool = True  # False of Python without a block for its output


@dataclass(frozen=True)
class Block:
    """A marked block, or a setup, which has no fence; `line` is that of the mark, from 1."""

    line: int
    kind: str
    language: str = ""
    argument: str = ""
    background: bool = False
    masks: tuple[str, ...] = ()
    body: str = ""
    steps: tuple[Step, ...] = ()


def pages(root: Path) -> list[Path]:
    """Return the pages whose blocks are marked."""
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted(root.glob("docs/**/*.md")), *root.glob("models/*.md")]


def read_blocks(lines: Sequence[str]) -> tuple[list[Block], list[PageError]]:
    """Return the blocks of a page in their order, and what is wrong with its marks."""
    blocks: list[Block] = []
    errors: list[PageError] = []
    mark: Block | None = None
    at = 0
    while at < len(lines):
        begin = at
        try:
            if found := _FENCE.fullmatch(lines[at]):
                at = _end_of_fence(lines, at, found)
                marked, mark = mark, None
                if marked is None:
                    raise PageError(
                        begin + 1, "a block without a mark: `<!-- run -->`, `<!-- not run: REASON -->`, ..."
                    )
                block = _block(marked, found, lines, begin + 1, at)
                at += 1
                if block.kind == "output":
                    _give_output(blocks, block)
                else:
                    blocks.append(block)
                continue
            if mark is not None:
                line, kind, mark = mark.line, mark.kind, None
                raise PageError(line, f"`{kind}` marks a block, which begins on the next line; there is none")
            if lines[at].lstrip().startswith("<!--"):
                at = next((n for n in range(at, len(lines)) if "-->" in lines[n]), at)
                mark = _read_mark("\n".join(lines[begin : at + 1]), begin + 1)
                if mark is not None and mark.kind == "setup":
                    blocks.append(mark)
                    mark = None
        except PageError as error:
            errors.append(error)
        at += 1
    if mark is not None:
        errors.append(PageError(mark.line, f"`{mark.kind}` marks a block, and there is none"))
    errors += [error for block in blocks for error in _stale_masks(block)]
    return blocks, errors


def _end_of_fence(lines: Sequence[str], begin: int, found: re.Match[str]) -> int:
    for at in range(begin + 1, len(lines)):
        text = lines[at].strip()
        if text.startswith(found["fence"]) and not text.strip(found["fence"][0]):
            return at
    raise PageError(begin + 1, "a block that does not end")


def _read_mark(comment: str, line: int) -> Block | None:
    """Return a mark; None for another comment."""
    found = _COMMENT.fullmatch(comment.strip())
    if found is None or re.match(r"(run|setup|not run|file|output)\b", found["text"]) is None:
        return None
    mark = _MARK.fullmatch(found["text"])
    if mark is None or (mark["argument"] is not None) != (mark["kind"] in _NEEDS_ARGUMENT):
        raise PageError(line, f"a mark that is not understood: {found['text']}")
    if mark["kind"] != "run" and (mark["masks"] or (mark["background"] and mark["kind"] != "setup")):
        raise PageError(line, f"`{mark['kind']}` has neither masks nor a background: {found['text']}")
    masks = tuple(re.split(r",\s*", mark["masks"])) if mark["masks"] else ()
    if unknown := [name for name in masks if name not in MASKS]:
        raise PageError(line, f"no mask is called {', '.join(unknown)}; there are {', '.join(MASKS)}")
    return Block(line, mark["kind"], argument=mark["argument"] or "", background=bool(mark["background"]), masks=masks)


def _block(mark: Block, fence: re.Match[str], lines: Sequence[str], start: int, stop: int) -> Block:
    """Return a marked block with what its fence holds: `lines[start:stop]` of the page."""
    indent, language = fence["indent"], fence["language"].strip()
    if not language:
        raise PageError(start, "a block without a language: console, sh, python, json, text, ...")
    inner = [line.removeprefix(indent) for line in lines[start:stop]]
    block = replace(mark, language=language, body="".join(line + "\n" for line in inner))
    if mark.kind == "output":
        return replace(block, steps=(Step("", start, tuple(inner), start, stop, indent),))
    if mark.kind != "run":
        return block
    if language not in RUNNABLE:
        raise PageError(mark.line, f"a block in {language} cannot be run; {', '.join(RUNNABLE)} can")
    if language == "console":
        steps = _console(inner, start, indent)
    elif language == "pycon":
        steps = _pycon(block.body, start, indent)
    else:
        steps = [Step(block.body, start + 1, (), stop, stop, indent, has_place=False)]
    if block.background and (language != "console" or len(steps) != 1):
        raise PageError(mark.line, "what runs in the background is a console block of one command")
    return replace(block, steps=tuple(steps))


def _console(inner: list[str], start: int, indent: str) -> list[Step]:
    steps: list[Step] = []
    at = 0
    while at < len(inner):
        if not inner[at].startswith("$ "):
            raise PageError(start + at + 1, "a console block begins with a command: `$ ...`")
        line = start + at + 1
        command = [inner[at].removeprefix("$ ")]
        while command[-1].endswith("\\") and at + 1 < len(inner):
            at += 1
            command.append(inner[at])
        at += 1
        end = next((n for n in range(at, len(inner)) if inner[n].startswith("$ ")), len(inner))
        steps.append(Step("\n".join(command), line, tuple(inner[at:end]), start + at, start + end, indent))
        at = end
    return steps


def _pycon(body: str, start: int, indent: str) -> list[Step]:
    """Return what is typed at Python's prompt and what comes back."""
    steps = []
    for example in doctest.DocTestParser().get_examples(body):
        shown = tuple((example.want or "").splitlines())
        if example.exc_msg is not None:
            raise PageError(
                start + example.lineno + 1, "an exception is shown as `print(error)`, without its traceback"
            )
        first = start + example.lineno + example.source.count("\n")
        steps.append(Step(example.source, start + example.lineno + 1, shown, first, first + len(shown), indent))
    return steps


def _give_output(blocks: list[Block], output: Block) -> None:
    """Join what a python block prints to that block."""
    last = blocks[-1] if blocks else None
    if last is None or last.language != "python" or last.kind != "run" or last.steps[0].has_place:
        raise PageError(output.line, "`output` is what the python block above it prints; there is none that is run")
    blocks[-1] = replace(last, steps=(replace(output.steps[0], code=last.steps[0].code, line=last.steps[0].line),))


def _stale_masks(block: Block) -> list[PageError]:
    """Return an error for each mask that hides nothing of what is shown: it would hide what comes there later."""
    shown = [line for step in block.steps for line in step.shown]
    errors = []
    ordered = [name for name in MASKS if name in block.masks]
    for place, name in enumerate(ordered):
        if MASKS[name].search("\n".join(mask(shown, ordered[:place]))) is None:
            errors.append(StaleMaskError(block.line, f"stale mask: {name} hides nothing of what is shown"))
    return errors


def mask(lines: Sequence[str], masks: Sequence[str]) -> list[str]:
    """Put `<name>` for each part that a mask hides."""
    text = "\n".join(lines)
    for name, pattern in MASKS.items():
        if name in masks and name != ROUNDING:
            text = pattern.sub(f"<{name}>", text)
    return text.split("\n") if lines else []


def matches(shown: Sequence[str], got: Sequence[str], masks: Sequence[str]) -> bool:
    """Tell whether this is the output that is shown: masked parts apart, and any lines for a line that is `...`."""
    wanted, found = mask(shown, masks), mask(got, masks)
    rounding = ROUNDING in masks
    parts: list[list[str]] = [[]]
    for line in wanted:
        if line.strip() == "...":
            parts.append([])
        else:
            parts[-1].append(line)
    if len(parts) == 1:
        return _same(wanted, found, rounding)
    first, *middle, last = parts
    end = len(found) - len(last)
    if end < len(first) or not _same(first, found[: len(first)], rounding) or not _same(last, found[end:], rounding):
        return False
    at = len(first)
    for part in middle:
        places = range(at, end - len(part) + 1)
        place = next((n for n in places if _same(part, found[n : n + len(part)], rounding)), None)
        if place is None:
            return False
        at = place + len(part)
    return True


def _same(wanted: Sequence[str], found: Sequence[str], rounding: bool) -> bool:
    if not rounding or len(wanted) != len(found):
        return list(wanted) == list(found)
    one, other = "\n".join(wanted), "\n".join(found)
    numbers = zip(_REAL.findall(one), _REAL.findall(other), strict=False)
    return _REAL.sub("#", one) == _REAL.sub("#", other) and all(
        math.isclose(float(a), float(b), **_REAL_TOLERANCE) for a, b in numbers
    )
