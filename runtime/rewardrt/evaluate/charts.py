"""The charts of a report, as SVG elements in the colours and the font of the page, light or dark.

Only this module imports matplotlib, which comes with the extra `report`. Charts are as wide as a telephone's screen, so
that their labels can be read there. The data of each chart is in the report's JSON file.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from rewardrt.display import visible
from rewardrt.errors import MissingExtraError
from rewardrt.evaluate.evaluation import Evaluation, Number
from rewardrt.evaluate.statistics import Calibration

WIDTH = 4.5  # inches, of 72 SVG units each
MOST_BARS = 40
_INK, _MUTED, _GRID, _RIGHT, _WRONG = "#000101", "#000102", "#000103", "#000104", "#000105"  # placeholders
_NAMES = {_INK: "ink", _MUTED: "muted", _GRID: "grid", _RIGHT: "right", _WRONG: "wrong"}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.titlesize": 10,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _GRID,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.usetex": False,
    "text.parse_math": False,
}


def require_matplotlib() -> None:
    """Raise MissingExtraError if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"--report needs matplotlib ({error}): pip install 'rewardrt[report]'") from error


def by_subset(evaluation: Evaluation) -> str | None:
    """Draw the scores of sections, subsets and values of --by, with intervals; None if there are fewer than two."""
    shown = [each for each in evaluation.numbers if each.level in ("overall", "section", "subset", "by")]
    shown = [each for each in shown if each.value is not None][:MOST_BARS]
    if len(shown) < 2:
        return None

    def draw(axes: Any) -> None:
        places = np.arange(len(shown))[::-1]
        for place, each in zip(places, shown, strict=True):
            if each.low is not None and each.high is not None:
                axes.plot([each.low, each.high], [place, place], color=_MUTED, linewidth=1.6, solid_capstyle="round")
            axes.plot(each.value, place, "o", color=_RIGHT, markersize=7 if each.level == "overall" else 4.5)
        axes.set_yticks(places, [_label(each) for each in shown])
        axes.set_ylim(-0.7, len(shown) - 0.3)
        axes.set_xlim(-0.02, 1.02)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("score, and its 95% interval")

    return _svg("scores", draw, height=0.9 + 0.21 * len(shown))


def rewards(evaluation: Evaluation) -> str | None:
    """Draw the distributions of the rewards of right and wrong answers (or steps)."""
    found = evaluation.rewards
    if found is None:
        return None
    words = ("right steps", "from the first wrong step on") if evaluation.asks_for == "steps" else ("right", "wrong")

    def draw(axes: Any) -> None:
        for counts, color, word in ((found.right, _RIGHT, words[0]), (found.wrong, _WRONG, words[1])):
            share = np.array(counts) / max(1, sum(counts))
            axes.stairs(share, found.edges, color=color, linewidth=1.6, label=word)
            axes.stairs(share, found.edges, color=color, alpha=0.18, fill=True)
        axes.legend(loc="best")
        axes.set_xlabel("reward")
        axes.set_ylabel(f"share of {'steps' if evaluation.asks_for == 'steps' else 'answers'}")

    return _svg("rewards", draw)


def margins(evaluation: Evaluation) -> str | None:
    """Draw the distribution of the margins between right and wrong answers."""
    found = evaluation.margins
    if found is None:
        return None

    def draw(axes: Any) -> None:
        total = max(1, sum(found.right) + sum(found.wrong))
        axes.stairs(
            np.array(found.right) / total, found.edges, color=_RIGHT, fill=True, alpha=0.75, label="right answer higher"
        )
        axes.stairs(np.array(found.wrong) / total, found.edges, color=_WRONG, fill=True, alpha=0.75, label="not higher")
        axes.axvline(0, color=_INK, linewidth=1)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=2)  # above the bars
        axes.set_xlabel("margin: reward of the right answer - of the wrong one")
        axes.set_ylabel("share of pairs")

    return _svg("margins", draw)


def lengths(evaluation: Evaluation) -> str | None:
    """Draw rewards against lengths, with the medians of ten groups of equally many answers."""
    points = evaluation.points
    if not points or len({tokens for tokens, _, _ in points}) < 2:
        return None
    tokens, values = np.array([point[0] for point in points]), np.array([point[1] for point in points])
    right = np.array([point[2] for point in points])

    def draw(axes: Any) -> None:
        for which, color, word in ((right, _RIGHT, "right"), (~right, _WRONG, "wrong")):
            axes.plot(tokens[which], values[which], ".", color=color, markersize=3, alpha=0.5, label=word)
        parts = [part for part in np.array_split(np.argsort(tokens, kind="stable"), 10) if len(part)]
        middle = [(np.median(tokens[part]), np.median(values[part])) for part in parts]
        axes.plot(*zip(*middle, strict=True), "-", color=_INK, linewidth=1.6, label="median")
        if tokens.min() > 0 and tokens.max() / tokens.min() > 20:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.xaxis.set_minor_formatter("")
        axes.legend(loc="best", markerscale=3)
        axes.set_xlabel("tokens of the text")
        axes.set_ylabel("reward")

    return _svg("lengths", draw)


def calibration(evaluation: Evaluation) -> str | None:
    """Draw how often the answer with the higher reward is right, against the sigmoid of the margin."""
    found = evaluation.calibration
    if found is None:
        return None

    def draw(axes: Any, found: Calibration = found) -> None:
        axes.plot([0.5, 1], [0.5, 1], "--", color=_MUTED, linewidth=1, label="perfectly calibrated")
        axes.plot(found.expected, found.right, "o-", color=_RIGHT, linewidth=1.6, markersize=4.5, label="measured")
        axes.set_xlim(0.49, 1.01)
        axes.set_ylim(min(0.45, *found.right) - 0.03, 1.03)
        axes.legend(loc="best")
        axes.set_xlabel("predicted share right: sigmoid(margin)")
        axes.set_ylabel("observed share right")

    return _svg("calibration", draw)


def objectives(evaluation: Evaluation) -> str | None:
    """Draw the score of each objective if it were the reward."""
    shown = [each for each in evaluation.objectives if each.score is not None][:MOST_BARS]
    if not shown:
        return None

    def draw(axes: Any) -> None:
        places = np.arange(len(shown))[::-1]
        axes.barh(places, [each.score for each in shown], color=_RIGHT, alpha=0.75, height=0.6)
        axes.axvline(evaluation.score.value or 0.0, color=_INK, linewidth=1)
        axes.set_yticks(places, [_short(each.name) for each in shown])
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.01)
        axes.set_xlabel("score of each objective alone; the line is the reward's")

    return _svg("objectives", draw, height=0.9 + 0.24 * len(shown))


CHARTS: tuple[tuple[str, Callable[[Evaluation], str | None]], ...] = (
    ("Scores", by_subset),
    ("Rewards", rewards),
    ("Margins", margins),
    ("Reward against length", lengths),
    ("Calibration of margins", calibration),
    ("Objectives", objectives),
)


def _label(number: Number) -> str:
    return "score" if number.level == "overall" else _short(number.name)


def _short(name: str) -> str:
    shown = visible(name)
    return shown if len(shown) <= 26 else f"{shown[:25]}…"


def _svg(name: str, draw: Callable[[Any], None], *, height: float = 3.1) -> str:
    """Return a figure as an svg element that can be put into a page with others."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser's fonts draw the text
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _themed(buffer.getvalue())


def _themed(svg: str) -> str:
    """Return an svg element without preamble, with the page's colours and without ids that could clash."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    for color, name in _NAMES.items():
        svg = svg.replace(color, f"var(--{name})")
    # The page decides the size; the viewBox keeps the proportions.
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 xmlns:xlink="http://www.w3.org/1999/xlink">', svg)
    return svg.strip()
