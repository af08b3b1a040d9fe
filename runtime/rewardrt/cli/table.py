"""Scored rows laid out for people."""

from __future__ import annotations

from typing import Any

from rewardrt.cli.output import one_line
from rewardrt.display import visible
from rewardrt.reward_model import RewardModel


def describe_row(row: dict[str, Any], model: RewardModel, *, objectives: bool) -> str:
    """Show one scored row to a person: its prompt, and its answers best first."""
    if "error" in row:
        return f"error: {visible(row['error'])}\n"
    if not objectives:
        row.pop("objectives", None)  # the row's own field of this name, if it has one
    shown = _shown(next((row[name] for name in ("prompt", "messages", "text", "chosen") if row.get(name)), ""))
    kind = model.answers.parse(row).kind  # other fields than those of its kind are the row's own, whatever their names
    if kind == "ranking":
        return f"{one_line(shown, 96)}\n{ranking_table(row)}\n"
    if kind == "pair":
        pair = {
            "responses": [_shown(row["chosen"]), _shown(row["rejected"])],
            "rewards": [row["chosen_reward"], row["rejected_reward"]],
        }
        pair |= {name: row[name] for name in ("tokens", "truncated", "objectives") if name in row}
        return f"{one_line(shown, 96)}\n{ranking_table(pair)}\n"
    if model.spec.input == "steps":
        steps = row.get("steps") or [""] * len(row["step_rewards"])  # a text holds its steps itself
        lines = [
            f"{reward:9.4f}  {one_line(step, 84)}" for step, reward in zip(steps, row["step_rewards"], strict=True)
        ]
        whole = f"{row['reward']:9.4f}  " if "reward" in row else ""
        return "\n".join([f"{whole}{one_line(shown, 84)}", *lines]) + "\n"
    values = f"{objectives_lines(row['objectives'])}\n" if "objectives" in row else ""
    answer = shown if row.get("response") is None else str(row["response"])
    return f"{row['reward']:9.4f}  {one_line(answer, 84)}\n{values}"


def _shown(value: Any) -> str:
    """Return the text of a field that is a string, or of the last message where it is a conversation."""
    return value if isinstance(value, str) else str(value[-1].get("content") or "")


def ranking_table(row: dict[str, Any]) -> str:
    """Lay out a row with `responses` and `rewards` as a table, best first."""
    order = sorted(range(len(row["rewards"])), key=lambda index: -row["rewards"][index])
    lines = ["rank     reward  tokens  answer"]
    for rank, index in enumerate(order, 1):
        cut = f" [{row['truncated'][index]} tokens cut]" if row["truncated"][index] else ""
        answer = one_line(str(row["responses"][index]), 72) + cut
        lines.append(f"{rank:4d}  {row['rewards'][index]:9.4f}  {row['tokens'][index]:6d}  {answer}")
        lines += [objectives_lines(row["objectives"][index])] if "objectives" in row else []
    return "\n".join(lines)


def objectives_lines(values: dict[str, float]) -> str:
    """Lay out one text's objectives under its line."""
    return "\n".join(f"{value:15.4f}  {visible(label)}" for label, value in values.items())
