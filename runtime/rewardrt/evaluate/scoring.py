"""Score the rows of a benchmark's files in windows, as `rewardrt score` does, and keep little of each row.

find_sources -> RowReader.lines -> asked_lines -> files.score_file -> Collector -> Results
"""

from __future__ import annotations

import heapq
import itertools
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rewardrt.data.files import Summary, score_file
from rewardrt.data.inputs import InputFile
from rewardrt.data.lines import Line
from rewardrt.data.readers import RowReader
from rewardrt.errors import RewardRTError, RowError
from rewardrt.evaluate.layouts import Layout, Question
from rewardrt.evaluate.results import Results
from rewardrt.evaluate.sources import Asked, Options, Source, asked_lines, lines_of
from rewardrt.reward_model import RewardModel
from rewardrt.scoring.scored import Scored, ScoredRow

WORST = 20  # number of rows whose texts are kept
SHOWN = 12_000  # characters kept of all texts of such a row
LEAST_SHOWN = 400  # characters kept at least of each of its texts
MOST_GROUPS = 200  # subsets, or values of --by, that are counted separately; all others count as one
FAILURES = 20  # number of error messages that are kept


@dataclass(frozen=True)
class Shown:
    """A row with its texts, for people: how wrong it is, its rewards, and which answers are right."""

    gap: float
    file: str
    number: int
    id: str
    subset: str
    prompt: str
    answers: tuple[str, ...]
    rewards: tuple[float, ...]
    right: tuple[bool, ...]
    label: int


@dataclass(frozen=True)
class Failure:
    """A row that could not be scored, or not compared with its earlier rewards."""

    file: str
    message: str


@dataclass
class Scores:
    """All that is kept of the rows of one benchmark.

    `earlier` has the earlier rewards, if a comparison was requested.
    """

    layout: Layout
    results: Results
    earlier: Results | None
    worst: list[Shown]
    failures: list[Failure]
    failed: int
    not_compared: list[Failure]
    summary: Summary
    files: list[InputFile]


def score_sources(
    model: RewardModel,
    sources: Sequence[Source],
    options: Options,
    watch: Callable[[RowReader], Callable[[Summary], None]] | None = None,
) -> Scores:
    """Score all rows of files with one layout.

    `watch` is called with the reader of each file, and returns a function that is told the progress. Raises
    RewardRTError if the model does not give the kind of rewards that the benchmark needs, or if no row can be scored.
    """
    layout = sources[0].layout
    check_kind(model, layout)
    collector, summary = Collector(model, layout, options), Summary()
    for source in sources:
        reader = RowReader([source.file])
        lines = asked_lines(lines_of(reader, options), source, options, several=len(sources) > 1)
        if options.rows is not None:
            lines = itertools.islice(lines, options.rows)
        collector.source = source
        of_file = score_file(
            model.answers.prepare,
            lambda ready: model.score_prepared(ready, normalize=options.normalize),
            lines,
            lambda data: None,
            encode=collector,
            progress=watch(reader) if watch is not None else None,
        )
        summary.add(of_file)
    if not summary.scored:
        first = f"; the first: {collector.failures[0].message}" if collector.failures else ""
        raise RewardRTError(f"{sources[0].file.name}: none of {summary.rows} rows can be scored{first}")
    return collector.finish(summary, [source.file for source in sources])


def check_kind(model: RewardModel, layout: Layout) -> None:
    """Raise RewardRTError if a model does not give the kind of rewards that a benchmark needs (answers or steps)."""
    gives = "steps" if model.spec.input == "steps" else "answers"
    if gives != layout.asks_for:
        raise RewardRTError(
            f"{layout.title} asks for rewards of {layout.asks_for}, and {model.bundle.name} ({model.spec.family}) "
            f"gives those of {gives}; evaluate a model that gives them"
        )


class Collector:
    """Keeps numbers of the scored rows as columns (about 30 bytes for each answer), and the texts of the worst rows."""

    source: Source

    def __init__(self, model: RewardModel, layout: Layout, options: Options) -> None:
        """Start without rows."""
        self._layout, self._options, self._labels = layout, options, len(model.spec.output.labels)
        self._rewards, self._earlier, self._objectives = array("d"), array("d"), array("d")
        self._right, self._tokens, self._truncated = array("b"), array("q"), array("q")
        self._sizes, self._first_wrong, self._positions = array("q"), array("q"), array("q")
        self._subsets, self._by, self._units = array("q"), array("q"), array("q")
        self._compared = array("b")
        self._ids: list[str] = []
        self._subset_names: dict[str, int] = {}
        self._by_names: dict[str, int] = {}
        self._unit_names: dict[str, int] = {}
        self._worst: list[tuple[float, int, Shown]] = []
        self._read = 0
        self.failures: list[Failure] = []
        self._failed = 0
        self._not_compared: list[Failure] = []

    def __call__(
        self, lines: Sequence[Line], results: Sequence[ScoredRow | RewardRTError], summary: Summary
    ) -> list[bytes]:
        """Keep the numbers of a window's rows; return no bytes to write."""
        for line, result in zip(lines, results, strict=True):
            assert isinstance(line, Asked)
            summary.count(line, result)
            self._read += 1
            if isinstance(result, RewardRTError):
                self._failed += 1
                if len(self.failures) < FAILURES:
                    message = str(result) if line.error is not None else f"row {line.number}: {result}"
                    self.failures.append(Failure(self.source.name, message))
            else:
                assert line.question is not None
                self._keep(line, line.question, result)
        return []

    def _keep(self, line: Asked, asked: Question, result: ScoredRow) -> None:
        if isinstance(result, Scored):
            rewards = result.steps
            self._tokens.extend([result.tokens + result.truncated, *[0] * (len(rewards) - 1)])
            self._truncated.extend([result.truncated, *[0] * (len(rewards) - 1)])
            self._right.extend([0] * len(rewards))
        else:
            rewards = tuple(answer.reward for answer in result.answers)
            self._tokens.extend(answer.tokens + answer.truncated for answer in result.answers)
            self._truncated.extend(answer.truncated for answer in result.answers)
            self._right.extend(asked.right)
            for answer in result.answers:
                self._objectives.extend(answer.objectives[: self._labels])
        self._rewards.extend(rewards)
        self._sizes.append(len(rewards))
        self._first_wrong.append(asked.label)
        self._positions.append(self._read)
        self._ids.append(asked.id)
        self._subsets.append(_group(self._subset_names, asked.subset))
        self._units.append(self._unit_names.setdefault(asked.unit, len(self._unit_names)))
        self._by.append(_group(self._by_names, line.by))
        if self._options.earlier:
            if isinstance(line.earlier, RowError):
                self._not_compared.append(Failure(self.source.name, str(line.earlier)))
            self._compared.append(not isinstance(line.earlier, RowError))
            self._earlier.extend(line.earlier if isinstance(line.earlier, tuple) else [math.nan] * len(rewards))
        gap = _gap(asked, rewards, self._options.threshold)
        if gap > 0 and (len(self._worst) < WORST or gap > self._worst[0][0]):
            shown = _shown(gap, self.source.name, line.number, asked, rewards)
            heap = heapq.heappush if len(self._worst) < WORST else heapq.heappushpop
            heap(self._worst, (gap, -self._read, shown))

    def finish(self, summary: Summary, files: list[InputFile]) -> Scores:
        """Return everything that was kept."""
        labels = self._labels if self._objectives else 0
        results = Results(
            rewards=np.array(self._rewards, dtype=np.float64),
            right=np.array(self._right, dtype=bool),
            tokens=np.array(self._tokens, dtype=np.int64),
            truncated=np.array(self._truncated, dtype=np.int64),
            objectives=np.array(self._objectives, dtype=np.float64).reshape(len(self._rewards), labels),
            starts=np.concatenate([[0], np.cumsum(self._sizes)]).astype(np.int64),
            labels=np.array(self._first_wrong, dtype=np.int64),
            subsets=np.array(self._subsets, dtype=np.int64),
            by=np.array(self._by, dtype=np.int64),
            units=np.array(self._units, dtype=np.int64),
            positions=np.array(self._positions, dtype=np.int64),
            ids=self._ids,
            subset_names=tuple(self._subset_names),
            by_names=tuple(self._by_names),
            threshold=self._options.threshold,
        )
        earlier = None
        if self._options.earlier:
            earlier = results.with_rewards(np.array(self._earlier, dtype=np.float64))
            earlier = earlier.only(np.array(self._compared, dtype=bool))
        worst = [shown for _, _, shown in sorted(self._worst, key=lambda each: (-each[0], -each[1]))]
        return Scores(
            self._layout, results, earlier, worst, self.failures, self._failed, self._not_compared, summary, files
        )


def _group(names: dict[str, int], name: str) -> int:
    """Return the index of a name; after MOST_GROUPS names, all new ones share one index."""
    return names.setdefault(name if name in names or len(names) < MOST_GROUPS else "(others)", len(names))


def _gap(asked: Question, rewards: Sequence[float], threshold: float) -> float:
    """Return how wrong a row is: the best wrong answer's reward minus the best right one's; at most 0 if it is right.

    For steps, it is how far the reward of the step predicted to be wrong is below the threshold, or, if no step was,
    how far the reward of the wrong step is above it.
    """
    if asked.right:
        right = [reward for reward, flag in zip(rewards, asked.right, strict=True) if flag]
        wrong = [reward for reward, flag in zip(rewards, asked.right, strict=True) if not flag]
        return max(wrong) - max(right) if right and wrong else 0.0
    first = next((index for index, reward in enumerate(rewards) if reward < threshold), -1)
    if first == asked.label:
        return 0.0
    return threshold - rewards[first] if first >= 0 else rewards[asked.label] - threshold


def _shown(gap: float, file: str, number: int, asked: Question, rewards: Sequence[float]) -> Shown:
    row = asked.row
    prompt = row.get("prompt", row.get("messages", ""))
    answers = row.get("responses") or row.get("steps") or [row.get("chosen"), row.get("rejected")]
    most = max(LEAST_SHOWN, SHOWN // (1 + len(answers)))
    return Shown(
        gap,
        file,
        number,
        asked.id,
        asked.subset,
        _text(prompt, most),
        tuple(_text(answer, most) for answer in answers),
        tuple(rewards),
        asked.right,
        asked.label,
    )


def _text(value: object, most: int) -> str:
    """Return a text, or the texts of messages, cut to `most` characters."""
    if isinstance(value, list | tuple):
        turns = [turn for turn in value if isinstance(turn, dict)]
        value = "\n\n".join(f"[{turn.get('role')}] {turn.get('content')}" for turn in turns)
    text = str(value)
    left = len(text) - most
    return text if left <= 0 else f"{text[:most]}… ({left:,} more characters)"
