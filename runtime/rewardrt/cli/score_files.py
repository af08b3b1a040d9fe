"""What `rewardrt score` does with files: an output that can be gone on with, what is said meanwhile and at the end."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rewardrt.cli import toplevel
from rewardrt.cli.output import for_people
from rewardrt.cli.progress import Progress
from rewardrt.cli.table import describe_row
from rewardrt.cli.toplevel import interruptible
from rewardrt.data.files import Summary
from rewardrt.data.inputs import STANDARD_INPUT
from rewardrt.data.jobs import Job
from rewardrt.data.journal import Unfinished, unfinished
from rewardrt.data.output_formats import OUTPUT_FORMATS
from rewardrt.data.outputs import open_output
from rewardrt.errors import RewardRTError
from rewardrt.reward_model import RewardModel


def score_files(model: RewardModel, job: Job, output: str | None, format_name: str, resume: bool, table: bool) -> None:
    """Score the rows of files, to a file that can be gone on with, to standard output, or as tables for people."""
    target = Path(output).resolve() if output not in (None, STANDARD_INPUT) else None
    said: list[str] = []
    if target is not None and (target.is_file() or not target.exists()):
        identity = job.identity(format_name)
        with unfinished(target, identity, resume=resume) as part:
            if part.summary.read:
                toplevel.say(f"{part.part}: going on after {part.summary.read} rows")
            progress = Progress(lambda: job.reader.share, lambda: model.statistics, part.summary.read)
            try:
                summary, said = interruptible(lambda: job.write(part, format_name, progress=progress), progress.tick)
            except KeyboardInterrupt as end:
                progress.finish()
                raise type(end)(_how_to_go_on(job, part)) from None
            except RewardRTError as error:
                progress.finish()
                if part.safe_rows:
                    raise type(error)(f"{error} ({_how_to_go_on(job, part)})") from error
                raise
    else:
        if resume:
            raise RewardRTError("--resume goes with --output FILE: nothing else is kept when a run is interrupted")
        progress = Progress(lambda: job.reader.share, lambda: model.statistics)
        summary = _stream(job, output, format_name, table, progress)
    seconds = progress.finish()
    _say_summary(model, summary, seconds, said)
    if summary.failed:
        sys.exit(1)


def _stream(job: Job, output: str | None, format_name: str, table: bool, progress: Progress) -> Summary:
    """Write rows to standard output, or a device, as they are scored."""
    each = OUTPUT_FORMATS[format_name]
    if each.pack is None:
        raise RewardRTError(f"{format_name} is written to a file; name one with --output")

    def show_rows(data: bytes) -> None:
        for line in data.splitlines():
            row = json.loads(line)
            file.write(for_people(describe_row(row, job.model, objectives=bool(job.options.labels))))

    with open_output(output) as file:
        encoder = job.encoder(format_name)
        write = show_rows if table else file.write

        def flushed(summary: Summary) -> None:
            file.flush()
            progress(summary)

        try:
            return interruptible(lambda: job.run(write, encoder, progress=flushed), progress.tick)
        except KeyboardInterrupt as end:
            progress.finish()
            raise type(end)(f"after {progress.summary.read} rows") from None
        finally:
            progress.finish()


def _how_to_go_on(job: Job, part: Unfinished) -> str:
    """Return how many rows are safe, and the command that goes on."""
    rows = part.safe_rows
    if not rows:
        part.forget()
        return "no row is safe yet; nothing was written"
    if job.reader.files[0].size is None:
        return f"{rows} rows are safe in {part.part}; standard input cannot be read again"
    command = shlex.join(["rewardrt", *sys.argv[1:], *([] if "--resume" in sys.argv else ["--resume"])])
    return f"{rows} rows are safe in {part.part}; go on with: {command}"


def _say_summary(model: RewardModel, summary: Summary, seconds: float, said: Sequence[str]) -> None:
    toplevel.say(
        f"scored {summary.scored} of {summary.rows} rows: {summary.texts} texts, {summary.tokens} tokens "
        f"in {seconds:.1f} s ({summary.tokens / max(seconds, 1e-9):.0f} tokens/s)"
    )
    say_truncated(summary.truncated_texts, summary.texts, model.spec.max_length)
    if summary.pairs:
        share = summary.pairs_right / summary.pairs
        ties = f", {summary.ties} ties" if summary.ties else ""
        toplevel.say(
            f"accuracy {share:.4f}: chosen above rejected in {summary.pairs_right} of {summary.pairs} pairs{ties}"
        )
    if summary.left_out:
        toplevel.say(f"{summary.left_out} rows were left out, by their margins")
    for line in said:
        toplevel.say(line)
    for name, rows in summary.unread.items():
        toplevel.say(f"{rows} row{'s' if rows > 1 else ''} had the field `{name}`, which nothing read")
    if summary.failed:
        toplevel.say(f"{summary.failed} of {summary.rows} rows could not be scored; they have `error`")


def say_truncated(cut: int, texts: int, limit: int) -> None:
    """Say how many texts were cut, if any was."""
    if cut:
        toplevel.say(f"{cut} of {texts} texts were cut at {limit} tokens; `truncated` says by how much")
