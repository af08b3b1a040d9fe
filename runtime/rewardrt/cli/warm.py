"""`rewardrt warm`: build the engine of a bundle before it is needed."""

from __future__ import annotations

import time
from pathlib import Path

import click

from rewardrt.cli import toplevel
from rewardrt.cli.engine_options import engine_cache_option, engine_log
from rewardrt.cli.options import example
from rewardrt.errors import ProviderError
from rewardrt.machine.providers import PROVIDER_CHOICES, ProviderChoice
from rewardrt.scoring.batching import BATCH_TOKENS


@click.command(short_help="Build a TensorRT engine ahead of use.", epilog=example("rewardrt warm bundle"))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--provider", type=click.Choice(PROVIDER_CHOICES), default="tensorrt", show_default=True)
@engine_cache_option
@click.option("--precision", default="auto", show_default=True, help="One of the bundle's graphs.")
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    default=BATCH_TOKENS,
    show_default=True,
    help="Tokens in one batch, padding included; use the value that scoring will use.",
)
def warm(bundle: Path, provider: ProviderChoice, precision: str, batch_tokens: int) -> None:
    """Build a bundle's TensorRT engine for this machine, and run it on every shape of batch once.

    Later commands find the engine in the cache: score, verify and serve start at once, and --provider auto takes
    TensorRT.
    """
    from rewardrt.reward_model import RewardModel

    start = time.perf_counter()
    with engine_log():
        model = RewardModel.load(bundle, provider=provider, precision=precision, batch_tokens=batch_tokens)
        profile = model.session.profile
        said = f"{model.bundle.name}: {model.precision} on {model.session.runs_on}"
        if profile is None:
            toplevel.say(f"{said}: there is no engine to build")
            return
        if model.session.note is not None:
            raise ProviderError(model.session.note)
        shapes = model.session.warm(batch_tokens, _show_tenths)
    toplevel.say(f"{said}: warm for {profile.describe()}, {shapes} shapes, in {time.perf_counter() - start:.1f} s")


def _show_tenths(done: int, of: int) -> None:
    if done * 10 // of > (done - 1) * 10 // of:
        toplevel.say(f"ran {done} of {of} shapes")
