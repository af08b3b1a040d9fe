"""`rewardrt trainer`: print the file or the lines that give a trainer its rewards."""

from __future__ import annotations

from pathlib import Path

import click

from rewardrt.cli.options import example
from rewardrt.cli.output import show


@click.command(
    short_help="Print what gives a trainer its rewards.",
    epilog=example(
        "rewardrt trainer",
        "rewardrt trainer trl --bundle bundle > rewards.py",
        "rewardrt trainer verl --url http://127.0.0.1:5000 > rewards.py",
    ),
)
@click.argument("name", required=False)
@click.option("--bundle", help="A bundle, which each process of the trainer loads.")
@click.option("--url", "urls", multiple=True, help="A server's address (rewardrt serve); several for several servers.")
def trainer(name: str | None, bundle: str | None, urls: tuple[str, ...]) -> None:
    """Print the file, or the lines, that give a trainer its rewards; without NAME, list the trainers.

    Save the file as rewards.py. A server's key is read from the environment variable REWARDRT_API_KEY.
    """
    from rewardrt.bundle.folder import find_manifest
    from rewardrt.client.address import address
    from rewardrt.trainers.listing import TRAINERS, find, printed

    if name is None:
        show("\n".join(f"{each.name:<14} {each.title}" for each in TRAINERS))
        return
    found = find(name)
    if (bundle is None) == (not urls):
        raise click.UsageError("give --bundle BUNDLE, or --url of a server")
    if bundle is None:
        show(printed(found, urls=[address(url) for url in urls]).rstrip("\n"))
        return
    if not bundle.startswith("hf://"):
        find_manifest(Path(bundle))
        bundle = str(Path(bundle).resolve())  # a trainer may run in another folder
    show(printed(found, bundle=bundle).rstrip("\n"))
