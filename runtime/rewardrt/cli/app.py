"""The `rewardrt` command: a group of small modules, one for each subcommand, that parse, call and print.

Results go to standard output, progress and logs to standard error. Exit status: 0, 1 (some rows failed, verification
failed), 2 (refused), 3 (a fault of ours); see `toplevel`. Commands of other packages (export) are found by entry point
and imported only when they are run.
"""

from __future__ import annotations

import importlib.metadata
import os

import click

from rewardrt.cli import toplevel
from rewardrt.cli.bench import bench
from rewardrt.cli.doctor import doctor
from rewardrt.cli.evaluate import evaluate
from rewardrt.cli.inspect import inspect
from rewardrt.cli.normalize import normalize
from rewardrt.cli.push import push
from rewardrt.cli.score import score
from rewardrt.cli.serve import serve
from rewardrt.cli.trainer import trainer
from rewardrt.cli.verify import verify
from rewardrt.cli.warm import warm

COMMANDS = "rewardrt.commands"  # the entry point group of further commands


class _Commands(click.Group):
    """The commands of this package, and those of installed packages that declare some."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_entry_points()})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        own = super().get_command(ctx, name)
        if own is not None or name not in _entry_points():
            return own
        command = _entry_points()[name].load()
        assert isinstance(command, click.Command)
        return command


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=COMMANDS)}


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="rewardrt", message="rewardrt %(version)s")
def app() -> None:
    """Export a trained reward model once; score text anywhere with onnxruntime.

    A BUNDLE is the folder that an export writes, or one on the Hugging Face Hub by its name: hf://ORG/NAME, or
    hf://ORG/NAME@REVISION.
    """


def main() -> None:
    """Run the command line; `toplevel` says how it ends."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # each of its retries would be a line, and the error is ours
    toplevel.run(app)


for command in (bench, doctor, evaluate, inspect, normalize, push, score, serve, trainer, verify, warm):
    app.add_command(command)
