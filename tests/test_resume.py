"""Nothing is lost: what ends a run leaves the rows that are safe, and the same command goes on to the same bytes."""

from __future__ import annotations

import fcntl
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from commands import run
from rewardrt import RewardModel
from rewardrt.cli.progress import Progress
from rewardrt.data.files import Summary
from rewardrt.data.inputs import find_inputs
from rewardrt.data.jobs import Job, JobOptions
from rewardrt.data.journal import unfinished
from rewardrt.data.pieces import Piece, PieceScorer, PiecesJob, PieceWork, join
from rewardrt.data.readers import RowReader
from rewardrt.data.selection import Selection
from rewardrt.errors import RewardRTError
from rewardrt.scoring.prefix import Statistics

BUNDLE = Path(__file__).parent / "bundles" / "version-1"
COMMAND = [sys.executable, "-c", "from rewardrt.cli.app import main; main()"]
FORMATS = ["jsonl", "jsonl.gz", "jsonl.zst", "json", "parquet"]


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return RewardModel.load(BUNDLE, provider="cpu")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9,500 rows: a window of 100, and three of at most 4,096."""
    return write_rows(tmp_path_factory.mktemp("rows"), 9500)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """700 rows: a window of 100, and three of 200."""
    return write_rows(tmp_path_factory.mktemp("few"), 700)


@pytest.fixture(scope="module")
def whole(rows: Path) -> dict[str, bytes]:
    """What the command makes of `rows` when nothing ends it, by the output's name."""
    found = {}
    for name in ("whole.jsonl", "whole.jsonl.gz"):
        assert run("score", BUNDLE, rows, "-o", rows.parent / name).returncode == 0
        found[name] = (rows.parent / name).read_bytes()
    return found


@pytest.fixture
def windows_of_200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewardrt.data.jobs.WINDOW_ROWS", 200)


def write_rows(folder: Path, count: int) -> Path:
    path = folder / "rows.jsonl"
    data = [
        {"id": index, "prompt": f"q{index // 4}", "response": "yes no maybe "[: index % 13]} for index in range(count)
    ]
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in data))
    return path


PLAIN = JobOptions()


class Ended(BaseException):
    """Stands for what ends a process."""


def score(
    model: RewardModel,
    inputs: Path,
    target: Path,
    format_name: str,
    *,
    resume: bool = False,
    windows: int = 99,
    options: JobOptions = PLAIN,
) -> Summary:
    job = Job(model, RowReader(find_inputs([str(inputs)])), options)
    left = [windows]

    def progress(summary: Summary) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Ended

    with unfinished(target, job.identity(format_name), resume=resume) as output:
        return job.write(output, format_name, progress=progress)[0]


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("kind", ["lines", "columns"])
@pytest.mark.usefixtures("windows_of_200")
def test_an_output_that_was_ended_anywhere_goes_on_to_the_same_bytes(
    model: RewardModel, few: Path, format_name: str, kind: str, tmp_path: Path
) -> None:
    if kind == "columns":
        score(model, few, tmp_path / "in", "parquet")
    rows = tmp_path / "in" if kind == "columns" else few
    whole = score(model, rows, tmp_path / "whole", format_name)
    for windows in (0, 1, 2, 3):
        target = tmp_path / f"out{windows}"
        with pytest.raises(Ended):
            score(model, rows, target, format_name, windows=windows)
        with (tmp_path / f"out{windows}.part").open("ab") as part:  # of the window that was being written
            part.write(b"half a window")
        with (tmp_path / f"out{windows}.journal").open("ab") as journal:
            journal.write(b'{"bytes": 99')
        with pytest.raises(RewardRTError, match=r"an unfinished output is there \([\d,]+ rows are safe\)"):
            score(model, rows, target, format_name)
        assert score(model, rows, target, format_name, resume=True) == whole
        assert target.read_bytes() == (tmp_path / "whole").read_bytes()
        assert not list(tmp_path.glob(f"out{windows}.*"))
    with pytest.raises(RewardRTError, match="is whole, there is nothing to resume"):
        score(model, rows, tmp_path / "out0", format_name, resume=True)


@pytest.mark.usefixtures("windows_of_200")
def test_at_most_one_window_is_computed_twice(model: RewardModel, few: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(Ended):
        score(model, few, target, "jsonl", windows=1)
    safe = json.loads((tmp_path / "out.journal").read_bytes().splitlines()[-1])["summary"]["read"]
    assert safe == 100 + 200
    before = model.statistics.given
    score(model, few, target, "jsonl", resume=True)
    tokens = [json.loads(line)["tokens"] for line in target.read_bytes().splitlines()]
    assert model.statistics.given - before == sum(tokens[safe:])


@pytest.mark.usefixtures("windows_of_200")
@pytest.mark.parametrize("twice", [False, True])
def test_groups_go_on_too(model: RewardModel, twice: bool, tmp_path: Path) -> None:
    rows = [
        {"pid": index // 4, "prompt": f"q{index // 4}", "response": "yes no maybe "[: index % 13]}
        for index in range(2400)
    ]
    if twice:
        rows.append(rows[0])
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    options = JobOptions(selection=Selection(best=True, group_by="pid"))
    with pytest.raises(Ended):
        score(model, source, tmp_path / "out", "jsonl", windows=2, options=options)
    if twice:
        with pytest.raises(RewardRTError, match="row 2401: pid 0 comes again after other rows"):
            score(model, source, tmp_path / "out", "jsonl", resume=True, options=options)
        return
    score(model, source, tmp_path / "out", "jsonl", resume=True, options=options)
    score(model, source, tmp_path / "whole", "jsonl", options=options)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert (tmp_path / "out").read_bytes().count(b"\n") == 600


@pytest.mark.usefixtures("windows_of_200")
def test_what_was_changed_is_not_gone_on_with(model: RewardModel, few: Path, tmp_path: Path) -> None:
    mine = tmp_path / "rows.jsonl"
    mine.write_bytes(few.read_bytes())
    with pytest.raises(Ended):
        score(model, mine, tmp_path / "out", "jsonl", windows=1)
    os.utime(mine, (1, 1))  # another time and the same rows
    part = (tmp_path / "out.part").read_bytes()
    with pytest.raises(RewardRTError, match=r'was begun with format "jsonl" and not "jsonl\.gz"'):
        score(model, mine, tmp_path / "out", "jsonl.gz", resume=True)
    with pytest.raises(RewardRTError, match=r"was begun with option normalize null and not true|no mean and std"):
        score(model, mine, tmp_path / "out", "jsonl", resume=True, options=JobOptions(normalize=True))
    with pytest.raises(RewardRTError, match="was begun with option selection"):
        score(model, mine, tmp_path / "out", "jsonl", resume=True, options=JobOptions(selection=Selection(best=True)))
    mine.write_bytes(few.read_bytes().replace(b"q174", b"q999"))
    with pytest.raises(RewardRTError, match="other inputs, or inputs that were changed since; go on with what"):
        score(model, mine, tmp_path / "out", "jsonl", resume=True)
    mine.write_bytes(few.read_bytes())
    (tmp_path / "out.journal").write_bytes(b"x\n")
    with pytest.raises(RewardRTError, match="not a journal of this version"):
        score(model, mine, tmp_path / "out", "jsonl", resume=True)
    (tmp_path / "out.journal").unlink()
    with pytest.raises(RewardRTError, match=r"only one of out\.part and out\.journal is there"):
        score(model, mine, tmp_path / "out", "jsonl", resume=True)
    assert (tmp_path / "out.part").read_bytes() == part


@pytest.mark.usefixtures("windows_of_200")
def test_an_output_is_written_by_one_process(model: RewardModel, few: Path, tmp_path: Path) -> None:
    job = Job(model, RowReader(find_inputs([str(few)])), JobOptions())
    with unfinished(tmp_path / "out", job.identity("jsonl"), resume=False) as output:
        output.write(b"x")
        output.commit(Summary(rows=1, read=1))
        with pytest.raises(RewardRTError, match=r"out\.part: another process is writing it$"):
            score(model, few, tmp_path / "out", "jsonl", resume=True)


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([*COMMAND, *map(str, arguments)], stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "moments"), [("SIGKILL", 6), ("SIGINT", 3), ("SIGTERM", 3)], ids=["kill -9", "Ctrl+C", "SIGTERM"]
)
def test_signals_at_random_moments_lose_nothing(
    name: str, moments: int, rows: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """A signal that can be answered comes when the bundle is loaded: before, Python alone would answer."""
    chance, number, target = random.Random(name), getattr(signal, name), tmp_path / "out.jsonl.gz"
    statuses = {"SIGKILL": -9, "SIGINT": 130, "SIGTERM": 143}
    ended = 0
    for _ in range(moments):
        process = start("score", BUNDLE, rows, "-o", target, "--resume")
        assert process.stderr is not None
        if number == signal.SIGKILL:
            time.sleep(chance.uniform(0.3, 1.6))
        else:
            assert process.stderr.readline().endswith(": fp32 on cpu\n")
            time.sleep(chance.uniform(0, 0.6))
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        if process.returncode == 0:  # it was done before
            target.unlink()
            continue
        ended += 1
        assert process.returncode == statuses[name], said
        if number != signal.SIGKILL:
            last = said.splitlines()[-1]
            safe = f" rows are safe in {target}.part; go on with: rewardrt score {BUNDLE} {rows} -o {target} --resume"
            nothing = ("error: interrupted: no row is safe yet; nothing was written", "error: interrupted")
            assert safe in last or last in nothing
    assert ended
    done = run("score", BUNDLE, rows, "-o", target, "--resume")
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == whole["whole.jsonl.gz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl.gz"]


@pytest.mark.slow
def test_a_disk_that_fills_up_keeps_what_is_safe(rows: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    limit = len(whole["whole.jsonl"]) // 2
    process = start(
        "score", BUNDLE, rows, "-o", tmp_path / "out.jsonl",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    said = process.communicate(timeout=100)[1].splitlines()[-1]
    assert process.returncode == 2
    assert (
        "out.jsonl: cannot be written (File too large); make room, or write to another disk (4196 rows are safe" in said
    )
    done = run("score", "--resume", BUNDLE, rows, "-o", tmp_path / "out.jsonl")
    assert f"{tmp_path}/out.jsonl.part: going on after 4196 rows" in done.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == whole["whole.jsonl"]


def ending_after(count: int, scorer: PieceScorer) -> Any:
    def results(pieces: Sequence[Piece]) -> Iterator[Summary]:
        for index, piece in enumerate(pieces):
            if index == count:
                raise Ended
            yield scorer(piece)

    return results


@pytest.mark.parametrize("joined", [True, False])
def test_a_job_in_pieces_goes_on_and_gives_the_same_rows(
    model: RewardModel, few: Path, joined: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewardrt.data.pieces.PIECE_ROWS", 140)
    monkeypatch.setattr("rewardrt.data.pieces.JOINED_ROWS", 140)
    whole = score(model, few, tmp_path / "whole", "jsonl")
    job = Job(model, RowReader(find_inputs([str(few)])), JobOptions())
    folder = tmp_path / "out"
    work = PieceWork(str(BUNDLE), (str(few),), str(folder), "jsonl", JobOptions(), joined=joined)
    scorer = PieceScorer(work, model)
    with pytest.raises(Ended):
        PiecesJob(work, job, resume=False).run(ending_after(2, scorer), lambda summary: None)
    with pytest.raises(RewardRTError, match="an unfinished output is there; go on with it by --resume"):
        PiecesJob(work, job, resume=False)
    pieces = PiecesJob(work, job, resume=True)
    assert [piece.index for piece in pieces.left] == [2, 3, 4]
    assert all(piece.start % 4 == 0 for piece in pieces.pieces)
    summary = pieces.run(ending_after(99, scorer), lambda summary: None)
    assert summary == whole
    if joined:
        assert join(pieces, job, tmp_path / "made") == []
        assert (tmp_path / "made").read_bytes() == (tmp_path / "whole").read_bytes()
        assert not folder.exists()
    else:
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["_SUCCESS", *(f"part-{index:05}.jsonl" for index in range(5))]
        parts = b"".join((folder / name).read_bytes() for name in names[1:])
        assert parts == (tmp_path / "whole").read_bytes()
        with pytest.raises(RewardRTError, match="is whole; name another output, or delete it"):
            PiecesJob(work, job, resume=True)


def test_an_object_store_has_a_folder_of_parts(few: Path, tmp_path: Path) -> None:
    """By pyarrow's file system of this machine, as it opens those of S3 and GCS."""
    uri = f"file://{tmp_path}/bucket/out"
    assert run("score", BUNDLE, f"file://{few}", "-o", tmp_path / "in.parquet").returncode == 0
    done = run("score", BUNDLE, f"file://{tmp_path}/in.parquet", "-o", uri, "--format", "parquet")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "bucket" / "out").iterdir()) == ["_SUCCESS", "part-00000.parquet"]
    assert pq.read_table(tmp_path / "bucket" / "out" / "part-00000.parquet").num_rows == 700
    again = run("score", BUNDLE, f"{uri}/", "-o", tmp_path / "again.jsonl")
    assert again.returncode == 0, again.stderr
    again = run("score", BUNDLE, f"{uri}/*.parquet", "-o", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes().count(b"\n") == 700
    assert run("score", BUNDLE, few, "-o", uri).returncode == 2


def test_a_log_gets_a_line_every_half_minute_and_rows_stay_clean(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    given = [Statistics(10, 10)]
    progress = Progress(lambda rows: rows / 4800, lambda: given[0])
    given[0] = Statistics(60_010, 30_010)
    progress(Summary(rows=1200, read=1200, failed=3, tokens=60_000))
    for _ in range(100):
        now[0] += 1
        progress.tick()
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 3
    assert err.splitlines()[0] == "25%, 90 s left, 1,200 rows, 2,000 tokens/s, 3 errors, 50% of tokens reused"


def test_what_is_left_of_a_window_is_told_by_its_tokens() -> None:
    given = [Statistics()]
    progress = Progress(lambda rows: rows / 1000, lambda: given[0])
    given[0] = Statistics(1000, 1000)
    progress(Summary(rows=100, read=100, tokens=1000))
    assert progress._now()[0] == 0.1
    given[0] = Statistics(3000, 3000)  # of the next window, whose rows are not counted yet
    assert progress._now()[0] == 0.3


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_the_share_is_of_the_rows_that_are_done_and_not_of_those_read_ahead(
    model: RewardModel, few: Path, name: str, tmp_path: Path
) -> None:
    path = few
    if name == "rows.parquet":
        score(model, few, tmp_path / name, "parquet")
        path = tmp_path / name
    reader = RowReader(find_inputs([str(path)]))
    assert len(list(reader.lines())) == 700
    for rows in (0, 100, 350, 699):
        assert abs(reader.share(rows) - rows / 700) < 0.12
    again = RowReader(find_inputs([str(path)]))
    assert len(list(again.lines(350))) == 350
    assert 0.4 < again.share(450) < 0.75


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(lambda rows: 0.5 if rows else 0.0, lambda: Statistics(100, 100))
    progress(Summary(rows=12, read=12))
    progress.tick()
    progress.finish()
    out, err = capsys.readouterr()
    assert out == ""
    assert "50%" in err
    assert "left, 12 rows, 0 tokens/s" in err


def test_resume_without_a_file_is_one_line() -> None:
    done = run("score", BUNDLE, "-", "--resume", stdin=b'{"text": "a"}\n')
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --resume goes with --output FILE")


def test_parts_of_lines_do_not_guess_each_a_schema_of_their_own(few: Path, tmp_path: Path) -> None:
    for format_name, message in (
        ("parquet", "the columns of JSON rows are known only after all rows were read"),
        ("datasets", "is a folder by itself"),
    ):
        done = run("score", BUNDLE, few, "-o", f"{tmp_path}/out/", "--format", format_name)
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1]
        assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("windows_of_200")
def test_an_output_among_its_own_inputs_goes_on(model: RewardModel, few: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(few.read_bytes())
    out = tmp_path / "zz.jsonl"
    for resume in (False, True):
        job = Job(model, RowReader(find_inputs([str(tmp_path)], str(out))), PLAIN)
        left = [1 if not resume else 99]

        def progress(summary: Summary, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Ended

        try:
            with unfinished(out, job.identity("jsonl"), resume=resume) as output:
                job.write(output, "jsonl", progress=progress)
        except Ended:
            assert not resume
    assert out.read_bytes().count(b"\n") == 700
    assert [file.name for file in find_inputs([f"{tmp_path}/*"], str(out))] == [str(tmp_path / "rows.jsonl")]


def test_what_a_process_left_that_ended_at_its_first_or_last_moment_is_tidied_up(
    model: RewardModel, few: Path, tmp_path: Path
) -> None:
    (tmp_path / "out.part").write_bytes(b"")
    (tmp_path / "out.journal").write_bytes(b"")  # before its first line
    (tmp_path / ".out.whole").write_bytes(b"half")  # while the output was made
    score(model, few, tmp_path / "out", "json", resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "out.journal").write_bytes(b'{"job": {}}\n')  # after the output had its name
    with pytest.raises(RewardRTError, match="is whole, there is nothing to resume"):
        score(model, few, tmp_path / "out", "json", resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_process_at_its_first_moment_keeps_its_files(model: RewardModel, few: Path, tmp_path: Path) -> None:
    (tmp_path / "out.part").write_bytes(b"")
    (tmp_path / "out.journal").write_bytes(b"")  # another process is about to write its first line
    with (tmp_path / "out.journal").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for resume in (False, True):
            with pytest.raises(RewardRTError, match=r"out\.part: another process is writing it$"):
                score(model, few, tmp_path / "out", "jsonl", resume=resume)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.journal", "out.part"]


@pytest.mark.usefixtures("windows_of_200")
def test_another_format_of_the_same_lines_can_be_gone_on_to(model: RewardModel, few: Path, tmp_path: Path) -> None:
    with pytest.raises(Ended):
        score(model, few, tmp_path / "out", "parquet", windows=1)
    score(model, few, tmp_path / "out", "jsonl", resume=True)
    score(model, few, tmp_path / "whole", "jsonl")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_shard_that_begins_with_rows_that_cannot_be_scored_goes_on(tmp_path: Path) -> None:
    rows = [{"text": "a"}] * 150 + [{"no": 1}] * 120 + [{"text": "b"}] * 30
    (tmp_path / "in.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    done = run("score", BUNDLE, tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--shard", "2/2")
    assert done.returncode == 1
    assert (tmp_path / "out.jsonl").read_bytes().count(b'"error"') == 120
