"""`rewardrt normalize`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from rewardrt.cli import toplevel
from rewardrt.cli.engine_options import engine_log
from rewardrt.cli.options import example, precision_option, provider_option, threads_option
from rewardrt.cli.output import show
from rewardrt.cli.progress import Progress
from rewardrt.cli.toplevel import interruptible
from rewardrt.data.inputs import find_inputs
from rewardrt.data.readers import RowReader
from rewardrt.errors import BundleError, RewardRTError
from rewardrt.machine.providers import ProviderChoice
from rewardrt.reward_model import RewardModel


@click.command(
    short_help="Measure the mean and std of your rewards.",
    epilog=example("rewardrt normalize bundle rows.jsonl -o normalized"),
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("file")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="NEW_BUNDLE", help="The bundle to write."
)
@provider_option
@precision_option
@threads_option
def normalize(
    bundle: Path, file: str, output: Path, provider: ProviderChoice, precision: str, threads: int | None
) -> None:
    """Measure mean and std of the rewards of your own data, and write a bundle that can normalise rewards by them.

    FILE has rows as `rewardrt score` takes them. The new bundle shares its files with the old one by hard links if the
    disk supports them. Its manifest contains mean, std and the SHA-256 of FILE; `rewardrt inspect` shows them. Rewards
    stay raw unless --normalize is given.
    """
    from rewardrt.evaluate.normalise import check, measure, write_normalised

    if output.exists() or output.is_symlink():
        raise BundleError(f"{output}: exists already; choose another folder")
    inputs = find_inputs([file])
    if inputs[0].size is None:
        raise RewardRTError(f"{inputs[0].name}: is read once, and its hash is kept; name a file")
    with engine_log():
        model = RewardModel.load(bundle, provider=provider, precision=precision, threads=threads)
    check(model)
    toplevel.say(f"{model.bundle.name}: {model.precision} on {model.session.runs_on}")
    reader = RowReader(inputs)
    progress = Progress(reader.share, lambda: model.statistics)
    try:
        measured = interruptible(lambda: measure(model, reader, progress), progress.tick)
    finally:
        progress.finish()
    before = model.spec.normalise
    written, linked = write_normalised(model.bundle, measured, output)
    affine, data = measured.affine, measured.data
    shared = "its files are links to those of" if linked else "its files are copies of those of"
    show(f"{output}: (reward - {affine.mean:g}) / {affine.std:g}, of {data.texts:,} rewards of {data.rows:,} rows")
    toplevel.say(f"{len(written.manifest.files)} files, {shared} {model.bundle.name}")
    if before is not None:
        toplevel.say(f"before: (reward - {before.mean:g}) / {before.std:g}")
    if data.truncated:
        toplevel.say(f"{data.truncated:,} texts were cut at {model.spec.max_length:,} tokens")
    if measured.failed:
        first = f"; the first: {measured.first_error}"
        toplevel.say(f"{measured.failed:,} rows could not be scored, and are left out{first}")
        sys.exit(1)
