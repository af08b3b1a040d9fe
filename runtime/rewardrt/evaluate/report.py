"""A report: one self-contained page, and its data as JSON next to it."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rewardrt.data.outputs import open_output
from rewardrt.display import visible, visible_lines
from rewardrt.errors import RewardRTError
from rewardrt.evaluate.charts import CHARTS, require_matplotlib
from rewardrt.evaluate.comparison import Comparison
from rewardrt.evaluate.evaluation import Evaluation, Number
from rewardrt.evaluate.scoring import Shown
from rewardrt.evaluate.subject import Subject
from rewardrt.evaluate.summary import between, in_digits, notes

PAGE, DATA = "index.html", "evaluation.json"
ROWS = 120  # most rows of a table


def prepare(folder: Path) -> None:
    """Check before scoring that a report can be written. Raises RewardRTError or MissingExtraError."""
    require_matplotlib()
    if (folder / PAGE).exists() or (folder / DATA).exists():
        raise RewardRTError(f"{folder}: has a report already; delete it, or name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".report"
        probe.mkdir()
        shutil.rmtree(probe)
    except OSError as error:
        raise RewardRTError(f"{folder}: cannot be written ({error.strerror}); name another folder") from error


def write_report(folder: Path, data: dict[str, Any], evaluations: Sequence[Evaluation], subject: Subject) -> Path:
    """Write the data and then the page; return the path of the page."""
    with open_output(folder / DATA) as output:
        output.write(json.dumps(data, indent=1, allow_nan=False).encode())
    with open_output(folder / PAGE) as output:
        output.write(page(evaluations, subject, data["card"], data["rewardrt"]).encode())
    return folder / PAGE


def page(evaluations: Sequence[Evaluation], subject: Subject, card: Sequence[str], version: str) -> str:
    """Return the whole page."""
    title = f"{subject.bundle}: {', '.join(each.title for each in evaluations)}"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body><main>",
        f"<header><h1>{_text(subject.bundle)}</h1><p>{_text(_what(subject))}</p></header>",
        *(_section(each) for each in evaluations),
        "<section><h2>For a model card</h2><pre class='card'>",
        "\n".join(_text(line) for line in card),
        "</pre></section>",
        _about(evaluations, subject, version),
        "</main></body></html>\n",
    ]
    return "".join(parts)


def _what(subject: Subject) -> str:
    normalised = ", normalised rewards" if subject.normalised else ""
    return f"{subject.checkpoint}: {subject.backbone}, {subject.parameters:,} parameters; {subject.graph}{normalised}"


def _section(evaluation: Evaluation) -> str:
    score = evaluation.score
    interval = "" if score.low is None else f"<span>95% {between(score.low, score.high)}</span>"
    counts = {
        "rows scored": f"{evaluation.scored:,} of {evaluation.rows:,}",
        "prompts": f"{evaluation.prompts:,}",
        "ties": f"{evaluation.ties:,}",
        "failed": f"{evaluation.failed:,}",
        "texts cut": f"{evaluation.truncated_texts:,} of {evaluation.texts:,}",
    }
    boxes = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in counts.items())
    return "".join(
        [
            f"<section><h2>{_text(evaluation.title)}</h2>",
            f"<p class='score'><strong>{in_digits(score.value)}</strong>{interval}</p><dl class='counts'>{boxes}</dl>",
            "<ul class='notes'>" + "".join(f"<li>{_text(note)}</li>" for note in notes(evaluation)) + "</ul>",
            "<div class='charts'>" + "".join(_charts(evaluation)) + "</div>",
            _numbers(evaluation.numbers),
            *(_comparison(each) for each in evaluation.comparisons),
            _objectives(evaluation),
            _worst(evaluation),
            _failures(evaluation),
            "</section>",
        ]
    )


def _charts(evaluation: Evaluation) -> Iterator[str]:
    for title, draw in CHARTS:
        drawn = draw(evaluation)
        if drawn is not None:
            svg = drawn.replace("<svg ", f'<svg role="img" aria-label="{_text(title)}" ', 1)
            yield f"<figure><figcaption>{_text(title)}</figcaption>{svg}</figure>"


def _numbers(numbers: Sequence[Number]) -> str:
    rows = [
        (
            number.level if number.level != "overall" else "score",
            number.name,
            in_digits(number.value),
            between(number.low, number.high),
            "" if number.rows is None else f"{number.rows:,}",
            "" if number.ties is None else f"{number.ties:,}",
        )
        for number in numbers
    ]
    return "<h3>All numbers</h3>" + _table(("kind", "of", "score", "95% interval", "rows", "ties"), rows, left=2)


def _comparison(found: Comparison) -> str:
    rows = [
        ("score here", in_digits(found.score)),
        ("score there", in_digits(found.other)),
        ("difference", f"{in_digits(found.difference)} ({between(found.low, found.high)})"),
        ("p of the paired test", f"{found.p:.4g}"),
        ("agreement", in_digits(found.agreement)),
        ("Kendall's tau of the rewards", in_digits(found.tau)),
        ("largest difference of a reward", f"{found.largest:.4g}"),
        ("rows compared", f"{found.rows:,}"),
        ("rows left out", f"{found.left_out:,}" + (f" ({found.first_left_out})" if found.first_left_out else "")),
        ("rows that count more here, or there", f"{found.better:,}, {found.worse:,}"),
    ]
    flips = [(f"{flip.row:,}", flip.id, f"{flip.credit:g}", f"{flip.other:g}") for flip in found.flips]
    listed = ""
    if flips:
        listed = f"<details><summary>{len(flips)} rows that flip</summary>"
        listed += _table(("row", "id", "here", "there"), flips, left=2) + "</details>"
    return f"<h3>Against {_text(found.name)}</h3>" + _table(("", ""), rows, left=2) + listed


def _objectives(evaluation: Evaluation) -> str:
    if not evaluation.objectives:
        return ""
    rows = [
        (each.name, in_digits(each.score), in_digits(each.right), in_digits(each.wrong))
        for each in evaluation.objectives
    ]
    head = ("objective", "score alone", "mean of right answers", "of wrong ones")
    return "<h3>Objectives</h3>" + _table(head, rows, left=1)


def _worst(evaluation: Evaluation) -> str:
    if not evaluation.worst:
        return ""
    return f"<h3>The {len(evaluation.worst)} rows that it gets most wrong</h3>" + "".join(map(_row, evaluation.worst))


def _row(shown: Shown) -> str:
    named = " · ".join(filter(None, (f"row {shown.number}", shown.id, shown.subset)))
    parts = [f"<details><summary>{_text(named)} <b>{shown.gap:.4f}</b></summary>"]
    parts.append(f"<h4>prompt</h4><pre>{_lines(shown.prompt)}</pre>")
    for index, (answer, reward) in enumerate(zip(shown.answers, shown.rewards, strict=False)):
        right = shown.right[index] if shown.right else index != shown.label
        kind = "right" if shown.right and right else "" if right else "wrong"
        word = f"{kind or 'step'} {index if not shown.right else ''}".strip()
        parts.append(f"<h4 class='{kind}'>{word}: {reward:.4f}</h4><pre class='{kind}'>{_lines(answer)}</pre>")
    return "".join([*parts, "</details>"])


def _failures(evaluation: Evaluation) -> str:
    if not evaluation.failures:
        return ""
    found = "".join(f"<li>{_text(each.file)}: {_text(each.message)}</li>" for each in evaluation.failures)
    return f"<h3>Rows that could not be scored</h3><p>{evaluation.failed:,} in all.</p><ul>{found}</ul>"


def _about(evaluations: Sequence[Evaluation], subject: Subject, version: str) -> str:
    certificate = subject.certificate
    certified = "never compared with torch" if subject.uncertified else f"no certificate of {subject.precision}"
    if certificate is not None:
        worst = max(certificate.single.max_std, certificate.batched.max_std)
        certified = f"within {worst:.1e} std of torch on {certificate.texts} texts ({certificate.reference})"
        if certificate.fidelity is not None:
            certified += f"; rms {certificate.fidelity.rms_std:.3f} std on {certificate.fidelity.texts} further texts"
    rows = [
        ("bundle", subject.bundle),
        ("checkpoint", subject.checkpoint),
        ("family", subject.family),
        ("backbone", f"{subject.backbone}, {subject.parameters:,} parameters"),
        ("precision", subject.precision),
        ("ran on", subject.runs_on),
        ("certificate", certified),
        ("longest text", f"{subject.max_length:,} tokens; what is longer is cut"),
        ("rewards", "normalised" if subject.normalised else "raw"),
        ("rewardrt", version),
    ]
    rows += [("file", f"{name}, SHA-256 {digest}") for each in evaluations for name, digest in each.files.items()]
    return f"<section><h2>What was evaluated</h2>{_table(('', ''), rows, left=2)}{_METHOD}</section>"


def _table(head: Sequence[str], rows: Sequence[Iterable[str]], *, left: int) -> str:
    """Return a table whose first `left` columns are text and whose other columns are numbers."""

    def cells(values: Iterable[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if index >= left else ' class=w' if index else ''}>{_text(value)}</{tag}>"
            for index, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows[:ROWS])
    more = f"<p>{len(rows) - ROWS:,} more are in {DATA}.</p>" if len(rows) > ROWS else ""
    top = f"<thead><tr>{cells(head, 'th')}</tr></thead>" if any(head) else ""
    return f"<div class='scroll'><table>{top}<tbody>{body}</tbody></table></div>{more}"


def _text(value: str) -> str:
    """Return a text as HTML, on one line."""
    return html.escape(visible(value))


def _lines(value: str) -> str:
    """Return a text as HTML, with its line breaks."""
    return html.escape(visible_lines(value.replace("\r\n", "\n").replace("\t", "    ")))


_METHOD = f"""<h3>How the numbers are made</h3><p>Intervals are 95% percentile intervals of a bootstrap over prompts.
Each sample draws as many prompts as there are, with replacement, and takes all rows of each. A tie means that the best
right and the best wrong answer have the same reward. It counts as in the benchmark's own code, and is also counted
separately. The length-controlled score uses rewards without the part that the number of tokens explains, among equally
right answers to one prompt. Calibration compares how often the answer with the higher reward is right with the sigmoid
of the margin. The p of a comparison comes from a paired permutation test, which exchanges the two models within
prompts. All data of this page is in {DATA}, next to it.</p>"""

_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1d2329;--muted:#59636e;--grid:#d8dde3;--right:#0b63a5;--wrong:#b4500b;
--soft:#f4f6f8}
@media (prefers-color-scheme:dark){:root{--paper:#14181d;--ink:#e6e9ed;--muted:#a3adb8;--grid:#39424c;--right:#6cb4f5;
--wrong:#f2a25c;--soft:#1d232a}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:16px}
h1{font-size:1.6rem;margin:.4rem 0 0;overflow-wrap:anywhere}h2{font-size:1.3rem;margin:2.2rem 0 .4rem}
h3{font-size:1.05rem;margin:1.6rem 0 .4rem}h4{font-size:.85rem;margin:.7rem 0 .2rem;color:var(--muted)}
header p{margin:.2rem 0;color:var(--muted);overflow-wrap:anywhere}
section{border-top:1px solid var(--grid)}header+section{border-top:0}
.score{margin:.2rem 0}.score strong{font-size:2.4rem;line-height:1.2;font-variant-numeric:tabular-nums}
.score span{margin-left:.8rem;color:var(--muted);white-space:nowrap}
.counts{display:flex;flex-wrap:wrap;gap:.4rem 1.6rem;margin:.4rem 0}
.counts dt{font-size:.8rem;color:var(--muted)}.counts dd{margin:0;font-variant-numeric:tabular-nums}
.notes{padding-left:1.2rem;margin:.6rem 0;font-size:.92rem}.notes li{overflow-wrap:anywhere}
.charts{columns:2 400px;column-gap:1.2rem}
figure{margin:0 0 1.2rem;break-inside:avoid}figcaption{font-weight:600;font-size:.95rem}
svg{display:block;width:100%;height:auto;max-width:560px}svg text{font-family:inherit!important}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;min-width:min(100%,20rem)}
th,td{text-align:left;vertical-align:top;padding:.22rem .9rem .22rem 0;border-bottom:1px solid var(--grid)}
.w{overflow-wrap:anywhere;min-width:7.5rem}
th{font-weight:600;color:var(--muted)}.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
details{border-bottom:1px solid var(--grid);padding:.3rem 0}summary{cursor:pointer;overflow-wrap:anywhere}
pre{margin:.2rem 0;padding:.5rem .6rem;background:var(--soft);border-left:3px solid var(--grid);white-space:pre-wrap;
overflow-wrap:anywhere;font:.85rem/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre.right{border-left-color:var(--right)}pre.wrong{border-left-color:var(--wrong)}
h4.right{color:var(--right)}h4.wrong{color:var(--wrong)}
@media (max-width:480px){th,td{padding-right:.55rem;font-size:.82rem}.score span{display:block;margin-left:0}}
@media print{:root{--paper:#fff;--ink:#000;--muted:#444;--grid:#bbb;--right:#0b63a5;--wrong:#b4500b;--soft:#f4f4f4}
body{font-size:11px}main{max-width:none;padding:0}figure,details,tr{break-inside:avoid}
h2,h3{break-after:avoid}}
"""
