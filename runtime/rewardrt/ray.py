"""Scoring on Ray: a class for `map_batches` in your own pipeline, and the jobs of `rewardrt score --ray`.

    import ray
    from rewardrt.ray import Scorer

    rows = ray.data.read_parquet("s3://bucket/rows/")
    scored = rows.map_batches(Scorer, fn_constructor_kwargs={"bundle": "bundle"}, batch_size=4096, concurrency=2)

Rows of one prompt should be in one batch: their common prefix is then computed only once. Needs the extra `ray`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rewardrt.bundle.spec import AggregateRule
from rewardrt.data.columns import in_memory, table_lines, table_of
from rewardrt.data.files import Summary
from rewardrt.data.jobs import Job, JobOptions, renamed
from rewardrt.data.pieces import Piece, PieceScorer, PieceWork
from rewardrt.data.readers import InMemory
from rewardrt.errors import MissingExtraError, RewardRTError
from rewardrt.reward_model import RewardModel

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # by default Ray sends usage data to its authors


class Scorer:
    """A class for `ray.data.Dataset.map_batches`, which loads the bundle once in each actor.

    Batches may be pyarrow tables, pandas data frames, or numpy arrays by column. The results are pyarrow tables: the
    batch's own columns, then the rewards as float32, `tokens`, `truncated` and `error`, as `rewardrt score` writes
    them.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        normalize: bool | None = None,
        aggregate: AggregateRule | None = None,
        objectives: bool = False,
        instruction: str | None = None,
        columns: dict[str, str] | None = None,
        **load: Any,
    ) -> None:
        """Load the bundle. Raises RewardRTError.

        `load` are the options of `RewardModel.load`. `columns` maps the row contract's field names to those of the
        rows. The other options are those of `rewardrt score`.
        """
        self.model = RewardModel.load(bundle, **load)
        labels = tuple(self.model.spec.output.labels) if objectives else ()
        self._options = JobOptions(normalize, aggregate, labels, instruction, columns=columns or {})

    def __call__(self, batch: Any) -> Any:
        """Score a batch of rows; return a pyarrow table of the rows with their rewards."""
        opened = in_memory(table_of(batch))
        job = Job(self.model, InMemory(opened), self._options)
        lines = list(renamed(table_lines(opened, 0), self._options.columns))
        prepared = self.model.answers.prepare(line.given for line in lines)
        results = self.model.score_prepared(
            prepared, normalize=self._options.normalize, aggregate=self._options.aggregate
        )
        encoder = job.table_encoder()
        scored = encoder.table(lines, results, Summary())
        return scored if scored is not None else encoder.schema.empty_table()


class PieceActor:
    """Scores pieces of a job inside Ray; `map_batches` passes their bounds."""

    def __init__(self, work: PieceWork) -> None:
        self._score = PieceScorer(work)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Score the pieces of a batch."""
        rows = zip(batch["index"], batch["start"], batch["stop"], strict=True)
        # As JSON, because Ray would turn the fields of an object into columns.
        summaries = [json.dumps(asdict(self._score(Piece(*map(int, row))))) for row in rows]
        return {"summary": summaries}


def start(address: str | None) -> Any:
    """Return Ray, connected to a cluster or started on this machine. Raises RewardRTError."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError(f"--ray needs ray ({error}): pip install 'rewardrt[ray]'") from error
    logging.disable(logging.WARNING)  # Ray Data logs every step, whatever the level of its logger
    try:
        if not ray.is_initialized():
            with _asking_nobody(starts=address is None) as environment:
                ray.init(
                    address=address,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    runtime_env={"env_vars": environment} if environment else None,
                )
        ray.data.DataContext.get_current().enable_progress_bars = False
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise RewardRTError(f"--ray {address or ''}: {' '.join(str(error).split())[:200]}") from error
    return ray


@contextlib.contextmanager
def _asking_nobody(*, starts: bool) -> Iterator[dict[str, str]]:
    """Keep a Ray started here from asking the metadata services of three clouds where it runs.

    Ray asks for its usage reports, even if these are switched off. Its requests use the environment variable
    `http_proxy`, which meanwhile points to a closed port. Yields the variables that the actors get instead.
    """
    before = os.environ.get("http_proxy")
    if not starts:
        yield {}
        return
    os.environ["http_proxy"] = "http://127.0.0.1:9"  # no proxy listens there
    try:
        yield {"http_proxy": before or ""}
    finally:
        if before is None:
            del os.environ["http_proxy"]
        else:
            os.environ["http_proxy"] = before


def score_pieces(
    pieces: Sequence[Piece], *, ray: Any, work: PieceWork, actors: int | None, gpu: bool
) -> Iterator[Summary]:
    """Yield the counts of each piece as actors finish it.

    If an actor dies, it is restarted and scores its piece again.
    """
    if not pieces:
        return
    total = ray.cluster_resources()
    actors = actors or max(1, int(total.get("GPU", 0)) if gpu else len(ray.nodes()))
    actors = min(actors, len(pieces))
    cpus = max(1, int(total.get("CPU", 1)) // actors)
    load = work.load if gpu or work.load.get("threads") else work.load | {"threads": cpus}
    items = [{"index": piece.index, "start": piece.start, "stop": piece.stop} for piece in pieces]
    data = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        PieceActor,
        fn_constructor_args=(replace(work, load=load),),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=cpus,
        num_gpus=1 if gpu else 0,
    )
    try:
        for row in data.iter_rows():
            yield Summary(**json.loads(row["summary"]))
    except ray.exceptions.RayError as error:
        cause = error.cause if isinstance(getattr(error, "cause", None), RewardRTError) else None
        said = str(cause) if cause else " ".join(str(error).split())[-300:]
        raise RewardRTError(f"Ray: {said}") from error
