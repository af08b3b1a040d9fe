"""The `rewardrt` command."""

from rewardrt.cli.app import main as main
