"""Scored rows as text for people, in lines of a given width in columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewardrt.cli.output import columns, one_line
from rewardrt.display import visible
from rewardrt.reward_model import RewardModel


def describe_row(row: dict[str, Any], model: RewardModel, *, objectives: bool, width: int) -> str:
    """Format one scored row: its prompt, and its answers with the best first."""
    if "error" in row:
        named = next((row[name] for name in ("prompt", "text") if isinstance(row.get(name), str) and row[name]), None)
        which = "" if named is None else f"{one_line(named, width)}\n"
        return f"{which}error: {visible(row['error'])}\n"  # never cut, because its end says what to do
    if not objectives:
        row.pop("objectives", None)  # a field of the input row, if any
    shown = _shown(next((row[name] for name in ("prompt", "messages", "text", "chosen") if row.get(name)), ""))
    kind = model.answers.parse(row).kind  # ignores other fields of the row, whatever their names
    if kind == "ranking":
        return f"{one_line(shown, width)}\n{ranking_table(row, width)}\n"
    if kind == "pair":
        pair = {
            "responses": [_shown(row["chosen"]), _shown(row["rejected"])],
            "rewards": [row["chosen_reward"], row["rejected_reward"]],
        }
        pair |= {name: row[name] for name in ("tokens", "truncated", "objectives") if name in row}
        return f"{one_line(shown, width)}\n{ranking_table(pair, width, marks=('chosen', 'rejected'))}\n"
    if model.spec.input == "steps":
        steps = row.get("steps") or [""] * len(row["step_rewards"])  # the steps are inside the text
        lines = [_line(step, reward, width) for step, reward in zip(steps, row["step_rewards"], strict=True)]
        return "\n".join([_line(shown, row.get("reward"), width), *lines]) + "\n"
    values = f"{objectives_lines(row['objectives'], width)}\n" if "objectives" in row else ""
    answer = shown if row.get("response") is None else str(row["response"])
    return f"{_line(answer, row['reward'], width)}\n{values}"


def _line(text: str, reward: float | None, width: int) -> str:
    """Return a text on one line, after its reward if it has one."""
    number = "" if reward is None else f"{reward:9.4f}  "
    return number + one_line(text, width - len(number))


def _shown(value: Any) -> str:
    """Return a field's text: the string itself, or the last message of a conversation."""
    return value if isinstance(value, str) else str(value[-1].get("content") or "")


def ranking_table(row: dict[str, Any], width: int, marks: Sequence[str] = ()) -> str:
    """Format a row with `responses` and `rewards` as a table, best first; `marks` are labels of the responses."""
    order = sorted(range(len(row["rewards"])), key=lambda index: -row["rewards"][index])
    rewards = [f"{reward:.4f}" for reward in row["rewards"]]
    wide, marked = max(9, *map(len, rewards)), max(map(len, marks), default=0)
    lines = [f"rank  {'reward':>{wide}}  tokens  {'':{marked + 2 if marks else 0}}answer"]
    for rank, index in enumerate(order, 1):
        cut = f" [{row['truncated'][index]} tokens cut]" if row["truncated"][index] else ""
        mark = f"{marks[index]:{marked}}  " if marks else ""
        before = f"{rank:4d}  {rewards[index]:>{wide}}  {row['tokens'][index]:6d}  {mark}"
        answer = one_line(str(row["responses"][index]), max(8, width - columns(before + cut)))
        lines.append(f"{before}{answer}{cut}")
        lines += [objectives_lines(row["objectives"][index], width)] if "objectives" in row else []
    return "\n".join(lines)


def objectives_lines(values: dict[str, float], width: int) -> str:
    """Format one text's objectives, one per line."""
    return "\n".join(f"{value:15.4f}  {one_line(label, max(8, width - 17))}" for label, value in values.items())
