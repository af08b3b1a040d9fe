"""`rewardrt push`: upload a bundle to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import click

from rewardrt.cli import toplevel
from rewardrt.cli.options import example
from rewardrt.cli.output import show


@click.command(
    short_help="Upload a bundle to the Hugging Face Hub.", epilog=example("rewardrt push bundle ORG/NAME --private")
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("repository", metavar="ORG/NAME", required=False)
@click.option("--private", is_flag=True, help="Make the repository private; an existing one must be private already.")
@click.option("--revision", metavar="BRANCH", default="", help="The branch to push to.  [default: main]")
@click.option("--message", metavar="M", help="The commit message.  [default: names the model]")
@click.option("--new-card", is_flag=True, help="Replace the model card that the repository has.")
@click.option("--show-card", is_flag=True, help="Print the model card and push nothing; needs no network.")
def push(
    bundle: Path,
    repository: str | None,
    private: bool,
    revision: str,
    message: str | None,
    new_card: bool,
    show_card: bool,
) -> None:
    """Push a bundle to a repository of the Hugging Face Hub, which is created if it does not exist.

    Every file's hash is checked first. One commit uploads the manifest, the files that it lists, and a model card made
    from it (README.md), and nothing else in the folder. An existing card is kept. The token is that of HF_TOKEN or `hf
    auth login`. golden.jsonl is uploaded too: it contains the texts that the export was certified on, including those
    of --golden. Needs the extra `hub`.
    """
    from rewardrt.bundle import hub
    from rewardrt.bundle.card import model_card
    from rewardrt.bundle.manifest import GOLDEN, MANIFEST, read_bundle

    target = None
    if repository is not None:
        target = hub.named(f"{repository.removeprefix(hub.PREFIX)}{f'@{revision}' if revision else ''}")
        if target is None or target.revision != revision:
            at = f" and --revision {revision}" if revision else ""
            raise click.UsageError(f"{repository}{at}: expected ORG/NAME, and a branch by --revision")
    elif not show_card:
        raise click.UsageError("give the repository to push to, ORG/NAME (or --show-card to push nothing)")
    if hub.parse(bundle) is not None:
        raise click.UsageError(f"{hub.parse(bundle)}: push takes the folder of a bundle")
    opened = read_bundle(bundle)
    card = model_card(opened, target.name if target is not None else "ORG/NAME")
    if show_card or target is None:
        show(card.rstrip("\n"))
        return
    hashes = {record.path: record.sha256 for record in opened.manifest.files}
    files = {name: opened.path / name for name in (*hashes, MANIFEST)}
    size = sum(record.bytes for record in opened.manifest.files)
    texts = "" if opened.manifest.uncertified else f"; {GOLDEN} holds the texts that were certified on"
    toplevel.say(f"pushing {len(files)} files, {size / 1e6:,.1f} MB, to {target}{texts}")
    spec = opened.manifest.spec
    url, pushed = hub.upload(
        target,
        {**files, hub.README: card.encode()},
        hashes,
        private=private,
        message=message or f"{spec.family}, {spec.backbone}, exported with rewardrt",
        new_card=new_card,
    )
    show(f"{url}\n{pushed}")
