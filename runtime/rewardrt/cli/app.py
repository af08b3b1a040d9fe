"""The `rewardrt` command: a group of small modules, one for each subcommand, that parse, call and print.

Results go to standard output, progress and logs to standard error. Exit status: 0, 1 (some rows failed, verification
failed), 2 (refused), 3 (a bug of RewardRT); see `toplevel`. Commands of other packages (export) are found by their
entry points, and imported only when they are run.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import os

import click

from rewardrt.cli import toplevel
from rewardrt.cli.bench import bench
from rewardrt.cli.doctor import doctor
from rewardrt.cli.evaluate import evaluate
from rewardrt.cli.inspect import inspect
from rewardrt.cli.normalize import normalize
from rewardrt.cli.options import example
from rewardrt.cli.push import push
from rewardrt.cli.score import score
from rewardrt.cli.serve import serve
from rewardrt.cli.trainer import trainer
from rewardrt.cli.verify import verify
from rewardrt.cli.warm import warm

COMMANDS = "rewardrt.commands"  # entry point group of commands in other packages


# The commands in the order in which the help lists them; all others come last.
GROUPS = {
    "Begin": ("export", "score"),
    "Use": ("serve", "trainer", "evaluate", "normalize", "push"),
    "Look and check": ("inspect", "verify", "bench", "families"),
    "This machine": ("doctor", "warm"),
}
LAST = "More"


class _Commands(click.Group):
    """The commands of this package, and those that installed packages declare."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        found = {*super().list_commands(ctx), *_entry_points()}
        named = [name for names in GROUPS.values() for name in names if name in found]
        return [*named, *sorted(found - set(named))]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands in their groups, each with the first sentence of its help."""
        left = self.list_commands(ctx)
        width = max(map(len, left))
        for group, names in (*GROUPS.items(), (LAST, tuple(left))):
            rows = []
            for name in [name for name in names if name in left]:
                left.remove(name)
                command = self.get_command(ctx, name)
                assert command is not None
                rows.append((f"{name:<{width}}", command.get_short_help_str(formatter.width - width - 6)))
            if rows:
                with formatter.section(group):
                    formatter.write_dl(rows)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        own = super().get_command(ctx, name)
        if own is not None or name not in _entry_points():
            return own
        command = _entry_points()[name].load()
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or fail with a message that suggests similar names."""
        close = difflib.get_close_matches(args[0], self.list_commands(ctx))
        if self.get_command(ctx, args[0]) is None and close:
            ctx.fail(f"No such command '{args[0]}'; did you mean {' or '.join(close)}?")
        return super().resolve_command(ctx, args)


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=COMMANDS)}


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=example(
        "rewardrt export CHECKPOINT bundle", "rewardrt score bundle rows.jsonl --table", "rewardrt serve bundle"
    ),
)
@click.version_option(package_name="rewardrt", message="rewardrt %(version)s")
def app() -> None:
    """Export a trained reward model once; score text anywhere with onnxruntime.

    A BUNDLE is the folder that an export writes, or the name of one on the Hugging Face Hub: hf://ORG/NAME or
    hf://ORG/NAME@REVISION.
    """


def main() -> None:
    """Run the command line; `toplevel` decides how it ends."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # no line for each retry; we report the error
    toplevel.run(app)


for command in (bench, doctor, evaluate, inspect, normalize, push, score, serve, trainer, verify, warm):
    app.add_command(command)
