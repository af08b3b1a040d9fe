"""Scoring on Ray: a class for `map_batches` of your own pipeline, and whole jobs of `rewardrt score --ray`.

    import ray
    from rewardrt.ray import Scorer

    rows = ray.data.read_parquet("s3://bucket/rows/")
    scored = rows.map_batches(Scorer, fn_constructor_kwargs={"bundle": "bundle"}, batch_size=4096, concurrency=2)

Rows of one prompt that are in one batch share what is computed of it. Needs the extra `ray`.
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

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports its use to its authors, unless it is told not to


class Scorer:
    """A class for `ray.data.Dataset.map_batches`: it opens the bundle once in each actor.

    Takes batches as tables of pyarrow, data frames of pandas or arrays of numpy by column, and gives tables: the
    batch's own columns, and after them the rewards as float32, `tokens`, `truncated` and `error`, as
    `rewardrt score` writes them.
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
        """Load the bundle; `load` are the options of `RewardModel.load`, `columns` the names that rows have for fields.

        Raises RewardRTError.
        """
        self.model = RewardModel.load(bundle, **load)
        labels = tuple(self.model.spec.output.labels) if objectives else ()
        self._options = JobOptions(normalize, aggregate, labels, instruction, columns=columns or {})

    def __call__(self, batch: Any) -> Any:
        """Score a batch of rows, and return it with their rewards as a table of pyarrow."""
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
    """Scores pieces of a job; `map_batches` gives it their bounds."""

    def __init__(self, work: PieceWork) -> None:
        self._score = PieceScorer(work)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Score the pieces of a batch."""
        rows = zip(batch["index"], batch["start"], batch["stop"], strict=True)
        # As JSON: Ray would make columns of the fields of an object.
        summaries = [json.dumps(asdict(self._score(Piece(*map(int, row))))) for row in rows]
        return {"summary": summaries}


def start(address: str | None) -> Any:
    """Return Ray, connected to a cluster or started on this machine. Raises RewardRTError."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError(f"--ray needs ray ({error}): pip install 'rewardrt[ray]'") from error
    logging.disable(logging.WARNING)  # of this command: Ray Data tells of each step, whatever its logger's level
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
    """Keep a Ray that is started here from asking three clouds' metadata services where it is, for its reports of use.

    It asks even where reports are off. It goes by the variable `http_proxy`, which leads nowhere meanwhile; what is
    given are the variables that actors are to have instead.
    """
    before = os.environ.get("http_proxy")
    if not starts:
        yield {}
        return
    os.environ["http_proxy"] = "http://127.0.0.1:9"  # nobody listens there
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
    """Yield a summary of each piece, as actors finish them. An actor that dies is started again, and its piece too."""
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
