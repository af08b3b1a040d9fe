"""Options shared by several commands."""

from __future__ import annotations

from typing import Any

import click

from rewardrt.cli.engine_options import engine_cache_option
from rewardrt.machine.providers import PROVIDER_CHOICES


def example(*lines: str) -> str:
    """Return the end of a command's help: example command lines."""
    return "\b\n" + "\n".join([f"Example{'s' if len(lines) > 1 else ''}:", *(f"  {line}" for line in lines)])


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
_provider_option = click.option(
    "--provider",
    type=click.Choice(PROVIDER_CHOICES),
    default="auto",
    show_default=True,
    help="Execution provider. auto: CUDA if it works here, else the CPU. A named one must work, or the command fails.",
)


def provider_option(command: Any) -> Any:
    """Add --provider to a command, and --engine-cache."""
    return _provider_option(engine_cache_option(command))


precision_option = click.option(
    "--precision",
    default="auto",
    show_default=True,
    help="One of the bundle's graphs; auto: int8 on a CPU, half on a GPU, if its certificate allows; else the first.",
)
normalize_option = click.option(
    "--normalize/--raw", default=None, help="Normalised or raw rewards.  [default: as the bundle says, raw]"
)
threads_option = click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: physical cores]")
