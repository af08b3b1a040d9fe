"""`rewardrt verify`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import click

from rewardrt.cli.options import example, json_option, precision_option, provider_option, threads_option
from rewardrt.cli.output import show, show_json
from rewardrt.cli.progress import Steps
from rewardrt.machine.providers import ProviderChoice
from rewardrt.steps import Step, begin


@click.command(short_help="Compare a bundle with torch's rewards.", epilog=example("rewardrt verify bundle"))
@click.argument("bundle", type=click.Path(path_type=Path))
@provider_option
@precision_option
@threads_option
@json_option
def verify(bundle: Path, provider: ProviderChoice, precision: str, threads: int | None, as_json: bool) -> None:
    """Score the bundle's golden texts on this machine and compare with torch's rewards from the export.

    The exit status is 1 if a reward, or a text's tokens, differ by more than the certificate allows, and 2 if the
    bundle is uncertified, so that there is nothing to compare with.
    """
    from rewardrt.checks.verify import verify as run
    from rewardrt.reward_model import RewardModel

    with Steps(lasting=False) as steps:
        steps(Step(f"loading {bundle}"))
        model = RewardModel.load(bundle, provider=provider, precision=precision, threads=threads)
        found = run(model, count=begin(steps, "scoring the golden texts", "text"))
    if as_json:
        show_json(dataclasses.asdict(found) | {"passed": found.passed})
    else:
        where = f"{found.precision} on {found.provider}"
        show(f"{model.bundle.name}: {found.texts} texts, {where}, against torch at export")
        for name, deviation in (("alone", found.single), ("batched", found.batched)):
            show(
                f"  {name:8s} largest difference {deviation.max_absolute:.2e} = {deviation.max_std:.2e} "
                f"standard deviations (relative {deviation.max_relative:.2e})"
            )
        show(f"  pair order agreement {found.pair_order_agreement:.2%}, tolerance {found.tolerance_std:g} std")
        show("passed" if found.passed else f"FAILED: {'; '.join(found.problems)}")
    sys.exit(0 if found.passed else 1)
