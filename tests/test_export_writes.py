"""What the system refuses while a bundle is written: one line, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import traced_graphs
from checkpoints import write_sequence_classification
from rewardrt import RewardRTError
from rewardrt_export.pipeline import export

COMMAND = """
import pathlib, resource, signal, sys, tempfile
limit, temporary = int(sys.argv.pop(1)), sys.argv.pop(1)
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
if temporary == "none":
    def none():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp', '/var/tmp', '/usr/tmp']")
    tempfile.tempdir = None
    tempfile._get_default_tempdir = none
import traced_graphs
traced_graphs.share(True, pathlib.Path(sys.argv.pop(1)), writes=False)
from rewardrt.cli.app import main
sys.argv[0] = "rewardrt"
main()
"""


def run(*arguments: object, limit: int = 0, temporary: str = "some") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", COMMAND, str(limit), temporary, str(traced_graphs.folder()), *map(str, arguments)]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=240,
        env=os.environ | {"PYTHONUTF8": "1", "PYTHONPATH": path},
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose traced graph is there, so that the processes below need not trace it each."""
    folder = tmp_path_factory.mktemp("writes") / "rm"
    write_sequence_classification(folder)
    export(folder, folder.parent / "bundle", certified=False)
    return folder


@pytest.mark.parametrize("limit", [2_000, 30_000])  # the tokenizer, the graph's weights do not fit
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, checkpoint: Path, limit: int) -> None:
    result = run("export", checkpoint, tmp_path / "out" / "bundle", "--no-certify", limit=limit)
    assert (result.returncode, result.stdout) == (2, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'out' / 'bundle'}: cannot be written whole (")
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_a_temporary_folder_the_export_ends_in_a_bundle_or_one_line(tmp_path: Path, checkpoint: Path) -> None:
    result = run("export", checkpoint, tmp_path / "bundle", "--no-certify", temporary="none")
    assert "Traceback" not in result.stderr
    if result.returncode:
        assert result.returncode == 2
        assert "temporary" in result.stderr.splitlines()[-1]
        assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_written_is_one_line(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "file").write_text("")
    for target, message in (
        (tmp_path / "file" / "bundle", "cannot be written"),
        (Path("/proc/nothing/bundle"), "cannot be written"),
        (tmp_path / ("n" * 300), "cannot be written"),
    ):
        with pytest.raises(RewardRTError, match=message) as caught:
            export(checkpoint, target, certified=False)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
