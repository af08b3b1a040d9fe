"""Options that several commands have."""

from __future__ import annotations

import click

from rewardrt.machine.providers import PROVIDER_CHOICES

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
provider_option = click.option(
    "--provider",
    type=click.Choice(PROVIDER_CHOICES),
    default="auto",
    show_default=True,
    help="Execution provider. A named one is obtained or refused; auto takes CUDA where it starts, else the CPU.",
)
precision_option = click.option(
    "--precision",
    default="auto",
    show_default=True,
    help="One of the bundle's graphs; auto: int8 on a CPU, half on a GPU, if its certificate allows; else the first.",
)
threads_option = click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: physical cores]")
