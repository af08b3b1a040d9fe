"""Export, score, verify, doctor and serve ask for no name, connect to nothing and leave no file but their own.

They run in a network namespace in which every address is this machine's: see isolated_network.py. Controls beside them
show that what is counted would be.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from checkpoints import write_sequence_classification
from isolated_network import NOT_PERMITTED
from rewardrt import telemetry

ROOT = Path(__file__).parent.parent
BUNDLE = Path(__file__).parent / "bundles" / "version-1"
COMMAND = "from rewardrt.cli.app import main; main()"
# The library that is not ours speaks 5 to 15 seconds after its import; a server lives that long while the others run.
SERVER_SECONDS = 16


def isolated(folder: Path, program: str, *arguments: object, **environment: str | None) -> dict[str, Any]:
    """Run a Python program where nothing can leave; return what it tried, and the files that it left at home."""
    home, temporary = folder / "home", folder / "temporary"
    for made in (home, temporary):
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
    keep = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "OMP_NUM_THREADS")
    variables = {name: os.environ[name] for name in keep if name in os.environ}
    variables |= {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONUTF8": "1"}
    variables |= {name: value for name, value in environment.items() if value is not None}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "isolated_network.py", folder / "report.json", *command],
        capture_output=True, text=True, check=False, timeout=300, env=variables, cwd=folder,
    )  # fmt: skip
    if done.returncode == NOT_PERMITTED:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    report["left"] = sorted(str(path.relative_to(folder)) for made in (home, temporary) for path in made.rglob("*"))
    report["output"] = done.stdout + done.stderr
    return report


EVERYTHING = f"""
import json, subprocess, sys, time, urllib.request
bundle, checkpoint, other = sys.argv[1:]

def run(*arguments):
    done = subprocess.run([sys.executable, "-c", {COMMAND!r}, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

server = subprocess.Popen(
    [sys.executable, "-c", {COMMAND!r}, "serve", bundle, "--port", "0"], stderr=subprocess.PIPE, text=True
)
try:
    started = time.monotonic()
    url = next(line for line in server.stderr if line.startswith("serving ")).split(" at ")[1].split()[0]
    run("export", checkpoint, "out")
    run("export", other, "--explain")
    open("in.jsonl", "w").write(json.dumps({{"text": "some words"}}) + "\\n")
    assert "reward" in run("score", "out", "in.jsonl")
    assert run("verify", "out").splitlines()[-1] == "passed"
    assert "off: nothing leaves this machine" in run("doctor")
    body = json.dumps({{"rows": [{{"text": "some words"}}]}}).encode()
    request = urllib.request.Request(url + "/v1/reward", body, {{"Content-Type": "application/json"}})
    assert b"reward" in urllib.request.urlopen(request, timeout=20).read()
    time.sleep(max(0, started + {SERVER_SECONDS} - time.monotonic()))
    server.terminate()
    assert server.wait(20) == 0
finally:
    server.kill()
print("port", url.rsplit(":", 1)[1])
"""


def test_a_run_of_everything_asks_for_no_name_connects_to_nothing_and_leaves_no_file(tmp_path: Path) -> None:
    # A family whose tokenizer transformers would look up at its hub, to mend it.
    write_sequence_classification(tmp_path / "mistral", "mistral")
    found = isolated(tmp_path, EVERYTHING, BUNDLE, ROOT / "models" / "tiny", tmp_path / "mistral")
    assert found["status"] == 0, found["output"]
    port = found["output"].split("port ")[1].split()[0]
    assert found["names"] == []
    assert set(found["connections"]) == {f"tcp 127.0.0.1 {port}"}  # the one request
    # torch makes a folder for its compiler's cache when it is imported, and nothing here puts anything into it.
    assert [path for path in found["left"] if not re.fullmatch("temporary/torchinductor_[^/]*", path)] == []


LIBRARY = """
import os, sys, time
import rewardrt
import onnxruntime
model = rewardrt.RewardModel.load(sys.argv[1], provider="cpu")
model.score(text="some words")
"""


@pytest.mark.parametrize(
    "entry", ["rewardrt", "rewardrt.checks.bench", "rewardrt.cli.app", "rewardrt_export", "rewardrt_export.cli"]
)
def test_whichever_entry_is_imported_first_the_library_after_it_leaves_no_file(tmp_path: Path, entry: str) -> None:
    found = isolated(
        tmp_path,
        f"import {entry}\nimport onnxruntime\nimport huggingface_hub.constants as c\nprint(c.HF_HUB_DISABLE_TELEMETRY)",
    )
    assert (found["left"], found["names"], found["output"]) == ([], [], "True\n")


def test_control_a_name_and_connections_are_counted(tmp_path: Path) -> None:
    program = """
import socket
socket.getaddrinfo("rewards.example", 443)
for address in (("198.51.100.7", 443), ("127.0.0.1", 9)):
    try:
        socket.create_connection(address, timeout=2)
    except OSError:
        pass
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("203.0.113.9", 5000))
"""
    found = isolated(tmp_path, program)
    assert set(found["names"]) == {"rewards.example"}
    assert found["connections"] == ["tcp 198.51.100.7 443", "tcp 127.0.0.1 9", "udp 203.0.113.9 5000"]


def test_control_what_is_switched_off_leaves_files_where_the_user_switches_it_on(tmp_path: Path) -> None:
    on = isolated(tmp_path, LIBRARY, BUNDLE, ORT_DISABLE_TELEMETRY="0")
    assert any(path.endswith("/deviceid") for path in on["left"])
    late = isolated(tmp_path, "import onnxruntime\n" + LIBRARY, BUNDLE)
    assert any(path.endswith("/deviceid") for path in late["left"])  # as the documentation says
    assert isolated(tmp_path, LIBRARY, BUNDLE)["left"] == []


@pytest.mark.parametrize(
    ("before", "value", "said"),
    [
        ("", None, "off: nothing leaves this machine"),
        ("", "", "off: nothing leaves this machine"),
        ("", "true", "off: nothing leaves this machine"),
        ("import onnxruntime", "1", "off: nothing leaves this machine"),
        ("", "0", "on: onnxruntime's is left on by ORT_DISABLE_TELEMETRY=0; unset it, or set it to 1, to send nothing"),
        (
            "import onnxruntime",
            None,
            "on: onnxruntime was imported before rewardrt, and cannot be stopped; import rewardrt first, or set "
            "ORT_DISABLE_TELEMETRY=1 for the process",
        ),
    ],
)
def test_the_doctor_says_whether_anything_is_sent_and_the_users_variable_stays(
    tmp_path: Path, before: str, value: str | None, said: str
) -> None:
    program = f"{before}\nimport rewardrt.checks.doctor as d, os\nprint(d.examine().telemetry)\nprint(os.environ['ORT_DISABLE_TELEMETRY'])"
    found = isolated(tmp_path, program, ORT_DISABLE_TELEMETRY=value)
    assert found["output"].splitlines() == [said, value or "1"]


@pytest.mark.parametrize("value", ["1", "TRUE", " yes", "On", "y", "0", "2", "off", "no", "t", "enable", "00"])
def test_the_variable_is_read_as_onnxruntime_reads_it(tmp_path: Path, value: str) -> None:
    found = isolated(tmp_path, "import onnxruntime", ORT_DISABLE_TELEMETRY=value)
    assert telemetry._means_off(value) == (found["left"] == [])
