"""What `rewardrt score` does with files: a resumable output, and the messages during and after the job."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rewardrt.cli import toplevel
from rewardrt.cli.output import for_people, width_of
from rewardrt.cli.progress import Progress
from rewardrt.cli.table import describe_row
from rewardrt.cli.toplevel import interruptible
from rewardrt.data.files import Summary
from rewardrt.data.inputs import STANDARD_INPUT, is_uri
from rewardrt.data.jobs import Job
from rewardrt.data.journal import Unfinished, unfinished
from rewardrt.data.output_formats import OUTPUT_FORMATS
from rewardrt.data.outputs import open_output
from rewardrt.data.pieces import Piece, PieceScorer, PiecesJob, PieceWork, join
from rewardrt.errors import RewardRTError
from rewardrt.reward_model import RewardModel
from rewardrt.scoring.prefix import Statistics


def score_files(job: Job, output: str | None, format_name: str, *, resume: bool, table: bool) -> None:
    """Score the rows of files, to a file that can be resumed, to standard output, or as tables for people."""
    target = Path(output).resolve() if output not in (None, STANDARD_INPUT) else None
    model = job.model
    said: list[str] = []
    if target is not None and target.is_dir():
        raise RewardRTError(f"{output}: is a folder that is there; name a file, or {output}/ for a folder of parts")
    if target is not None and (target.is_file() or not target.exists()):
        identity = job.identity(format_name)
        with unfinished(target, identity, resume=resume) as part:
            if part.summary.read:
                toplevel.say(f"{part.part}: going on after {part.summary.read} rows")
            progress = Progress(job.reader.share, lambda: model.statistics, part.summary)
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
        progress = Progress(job.reader.share, lambda: model.statistics)
        summary = _stream(job, output, format_name, table, progress)
    _end(model, summary, progress, said)


def score_pieces(
    job: Job, work: PieceWork, *, resume: bool, ray_address: str | None, actors: int | None, joined: bool
) -> None:
    """Score the rows of files in pieces, here or on Ray: into a folder of parts, or `joined` into one file."""
    if job.reader.files[0].size is None:
        raise RewardRTError("standard input is read once, and cannot be scored in pieces; name files")
    target = Path(work.folder).resolve()
    if joined:
        work = replace(work, folder=f"{target}.parts", joined=True)
        if target.exists():
            raise RewardRTError(f"{target}: exists already; delete it, or name another output")
    elif not is_uri(work.folder):
        work = replace(work, folder=str(target))
    pieces = PiecesJob(work, job, resume=resume)
    total = max(1, pieces.rows)
    progress = Progress(
        lambda rows: min(1.0, rows / total),
        # On Ray only the other processes know how many tokens prefix reuse saved.
        lambda: job.model.statistics if ray_address is None else Statistics(*[pieces.summary.tokens] * 2),
        pieces.summary,
    )
    run: Callable[[Sequence[Piece]], Iterable[Summary]]
    if ray_address is not None:
        from rewardrt import ray as on_ray

        ray = on_ray.start(None if ray_address == "local" else ray_address)
        gpu = job.model.provider != "cpu"
        run = partial(on_ray.score_pieces, ray=ray, work=work, actors=actors, gpu=gpu)
    else:
        run = partial(map, PieceScorer(work, job.model))
    said: list[str] = []

    def score() -> Summary:
        summary = pieces.run(run, progress)
        if joined:
            said.extend(join(pieces, job, target))
        return summary

    try:
        summary = interruptible(score, progress.tick)
    except KeyboardInterrupt as end:
        progress.finish()
        raise type(end)(
            f"{pieces.summary.read} rows are safe in {work.folder}; go on with: {_same_command()}"
        ) from None
    _end(job.model, summary, progress, said)


def _end(model: RewardModel, summary: Summary, progress: Progress, said: Sequence[str]) -> None:
    _say_summary(model, summary, progress.finish(), said)
    if summary.failed:
        sys.exit(1)


def _stream(job: Job, output: str | None, format_name: str, table: bool, progress: Progress) -> Summary:
    """Write rows to standard output or a device while they are scored."""
    each = OUTPUT_FORMATS[format_name]
    if each.pack is None:
        raise RewardRTError(f"{format_name} is written to a file; name one with --output")

    def show_rows(data: bytes) -> None:
        for line in data.splitlines():
            row = json.loads(line)
            described = describe_row(row, job.model, objectives=bool(job.options.labels), width=width_of(sys.stdout))
            file.write(for_people(described))

    with open_output(output) as file:
        encoder = job.encoder(format_name)
        plain = show_rows if table else file.write

        def write_aside(data: bytes) -> None:
            with progress.aside():
                plain(data)
                file.flush()

        write = write_aside if sys.stdout.isatty() else plain  # the bar is on the same terminal

        def flushed(summary: Summary) -> None:
            file.flush()
            progress(summary)

        try:
            return interruptible(lambda: job.run(write, encoder, progress=flushed), progress.tick)
        except KeyboardInterrupt as end:
            raise type(end)(f"after {progress.summary.read} rows") from None
        finally:
            progress.finish()


def _how_to_go_on(job: Job, part: Unfinished) -> str:
    """Say how many rows are safe, and which command resumes the job."""
    rows = part.safe_rows
    if not rows:
        part.forget()
        return "no row is safe yet; nothing was written"
    if job.reader.files[0].size is None:
        return f"{rows} rows are safe in {part.part}; standard input cannot be read again"
    return f"{rows} rows are safe in {part.part}; go on with: {_same_command()}"


def _same_command() -> str:
    """Return the command line that resumes this one's output."""
    given = sys.argv[1:]
    return shlex.join(["rewardrt", *given[:1], *([] if "--resume" in given else ["--resume"]), *given[1:]])


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
    """Say how many texts were cut, if any were."""
    if cut:
        toplevel.say(f"{cut} of {texts} texts were cut at {limit} tokens; `truncated` says by how much")
