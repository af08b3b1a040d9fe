"""`rewardrt doctor`."""

from __future__ import annotations

import sys

import click

from rewardrt.cli.options import example, json_option
from rewardrt.cli.output import show, show_json


@click.command(short_help="Show what works on this machine.", epilog=example("rewardrt doctor"))
@json_option
def doctor(as_json: bool) -> None:
    """Show what is installed, which providers really start here, and how to fix the others."""
    from rewardrt.bundle.spec import to_json
    from rewardrt.checks.doctor import examine, format_report

    report = examine()
    show_json(to_json(report)) if as_json else show(format_report(report))
    sys.exit(0 if report.ok else 1)
