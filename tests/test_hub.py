"""Bundles by their name on the Hugging Face Hub: huggingface_hub's own client against a small server of its API."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner

from hub_server import GOOD_TOKEN, Hub, serving, variables
from rewardrt import RewardModel
from rewardrt.bundle import hub as names
from rewardrt.cli.push import push
from rewardrt.errors import HubError
from server_process import serving as serving_bundles

BUNDLE = Path(__file__).parent / "bundles" / "version-1"
FILES = {path.name: path.read_bytes() for path in BUNDLE.iterdir()}
ROWS = [{"prompt": "Name a colour.", "response": answer} for answer in ("Blue.", "Seven", "No, and good night.")]
TEXT = ["tokenizer.json", "chat_template.jinja", "golden.jsonl"]
COMMAND = "from rewardrt.cli.app import main; main()"
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def rewards() -> bytes:
    return np.asarray(RewardModel.load(BUNDLE, provider="cpu", precision="fp32").score_many(ROWS)).tobytes()


def python(hub: Hub, home: Path, program: str, *arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own: huggingface_hub reads its variables when it is imported."""
    command = [sys.executable, "-W", "error::UserWarning:rewardrt", "-c", program, *map(str, arguments)]
    environment = variables(hub, home, **changes)
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=home, timeout=100)


def rewardrt(hub: Hub, home: Path, *arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    return python(hub, home, COMMAND, *arguments, **changes)


LOAD = """
import json, os, pickle, sys
from rewardrt import BundleError, RewardModel
rows, name, precision = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
model = RewardModel.load(name, provider="cpu", precision=precision)
found = model.score_many(rows).tobytes()
print(model.bundle.name, found.hex())
"""
PICKLED = (
    LOAD
    + """
try:
    raise SystemExit(f"{model.bundle.file('model.half.onnx')} was not checked")
except BundleError as error:
    assert str(error).endswith("model.half.onnx was not downloaded; load the precision that it belongs to")
os.environ["HF_TOKEN"] = "hf_bad"  # whoever asks the Hub now gets an error
assert pickle.loads(pickle.dumps(model)).score_many(rows).tobytes() == found
child = os.fork()
if child == 0:
    os._exit(0 if model.score_many(rows).tobytes() == found else 1)
assert os.waitpid(child, 0)[1] == 0
"""
)


def load(hub: Hub, home: Path, name: str, precision: str = "fp32", program: str = LOAD, **changes: str) -> str:
    done = python(hub, home, program, json.dumps(ROWS), name, precision, **changes)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_a_bundle_of_the_hub_gives_the_same_bits_and_only_what_is_used_is_asked_for(
    hub: Hub, tmp_path: Path, rewards: bytes
) -> None:
    first = hub.add("org/rm", FILES | {"extra.bin": b"x", "modeling.py": b"raise SystemExit"})
    used = ["reward.json", *TEXT, "model.onnx", "model.onnx.data"]
    assert load(hub, tmp_path, "hf://org/rm", program=PICKLED) == f"hf://org/rm@{first} {rewards.hex()}\n"
    assert hub.files("GET") == hub.files("HEAD") == used
    assert {path for _, path, _ in hub.log} == {f"/org/rm/resolve/{'main' if name == 'reward.json' else first}/{name}" for name in used}  # fmt: skip
    hub.log.clear()
    # Another precision: its own files. The revision is looked up again, and everything else is in the cache.
    load(hub, tmp_path, "hf://org/rm", "half")
    assert hub.files("GET") == ["model.half.onnx", "model.half.onnx.data"]
    hub.log.clear()
    assert load(hub, tmp_path, f"hf://org/rm@{first}") == f"hf://org/rm@{first} {rewards.hex()}\n"
    assert hub.log == []


def test_a_branch_moves_and_a_commit_stays(hub: Hub, tmp_path: Path, rewards: bytes) -> None:
    first = hub.add("org/rm", FILES)
    changed = json.loads(FILES["reward.json"])
    changed["spec"]["normalise_by_default"] = True
    second = hub.repos["org/rm"].commit({"reward.json": json.dumps(changed).encode()}, "main")
    hub.repos["org/rm"].refs["feature/old"] = first
    assert load(hub, tmp_path, "hf://org/rm").split()[0] == f"hf://org/rm@{second}"
    assert load(hub, tmp_path, "hf://org/rm@feature/old") == f"hf://org/rm@{first} {rewards.hex()}\n"


def test_the_commands_take_names_and_say_the_commit(hub: Hub, tmp_path: Path, rewards: bytes) -> None:
    commit = hub.add("org/rm", FILES)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    inspected = rewardrt(hub, tmp_path, "inspect", "hf://org/rm")
    assert inspected.stdout.startswith(f"hf://org/rm@{commit}: openrlhf, llama, 28,224 parameters\n")
    assert inspected.stdout.endswith("  only the manifest was downloaded; files are checked when they are used\n")
    assert hub.files() == ["reward.json"]
    verified = rewardrt(hub, tmp_path, "verify", "hf://org/rm", "--precision", "fp32", "--provider", "cpu")
    assert verified.returncode == 0
    assert verified.stdout.startswith(f"hf://org/rm@{commit}: 29 texts, fp32 on cpu, against torch at export\n")
    parts = ["in.jsonl", "-o", "out/", "--provider", "cpu", "--precision", "fp32"]
    scored = rewardrt(hub, tmp_path, "score", "hf://org/rm", *parts)  # each part opens the bundle by its address
    assert (scored.returncode, scored.stderr.splitlines()[0]) == (0, f"hf://org/rm@{commit}: fp32 on cpu")
    (part,) = (tmp_path / "out").glob("part-*")
    found = [json.loads(line)["reward"] for line in part.read_text().splitlines()]
    assert np.array(found, dtype=np.float32).tobytes() == rewards


def test_evaluate_and_normalize_take_names(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("org/rm", FILES)
    pairs = [{"prompt": f"p{number}", "chosen": "yes " * number, "rejected": "no"} for number in range(1, 9)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    options = ["pairs.jsonl", "--provider", "cpu", "--precision"]
    plain = rewardrt(hub, tmp_path, "evaluate", "hf://org/rm", *options, "fp32", "--against", "hf://org/rm", "--json")
    assert plain.returncode == 0, plain.stderr
    found = json.loads(plain.stdout)
    assert found["model"]["bundle"] == f"hf://org/rm@{commit}"
    (compared,) = found["evaluations"][0]["comparisons"]
    assert compared["name"].startswith(f"hf://org/rm@{commit}, ") and compared["rows"] == 8
    assert f"hf://org/rm@{commit}: fp32 on cpu" in plain.stderr
    every = rewardrt(hub, tmp_path, "evaluate", "hf://org/rm", *options, "all", "--json")
    assert every.returncode == 0, every.stderr
    names = [each["name"] for each in json.loads(every.stdout)["evaluations"][0]["comparisons"]]
    assert "half on cpu" in names
    hub.log.clear()
    made = rewardrt(hub, tmp_path, "normalize", "hf://org/rm", *options, "fp32", "-o", "normal")
    assert made.returncode == 0, made.stderr
    # a bundle of its own is whole, whichever graph was measured with
    assert {path.name for path in (tmp_path / "normal").iterdir()} == set(FILES)
    assert rewardrt(hub, tmp_path, "score", "normal", "pairs.jsonl", "--normalize").returncode == 0


def test_a_server_serves_a_name_under_its_last_part_and_a_reload_takes_what_is_there_then(
    hub: Hub, tmp_path: Path
) -> None:
    first = hub.add("org/rm", FILES)
    chosen = {name: value for name, value in variables(hub, tmp_path, HF_HUB_OFFLINE="0").items() if name[:3] == "HF_"}
    chosen["REWARDRT_API_KEY"] = "secret"
    with serving_bundles("hf://org/rm", "--provider", "cpu", "--precision", "fp32", **chosen) as server:
        assert server.wait_for("rm: fp32 on cpu").startswith(f"rm: fp32 on cpu, from hf://org/rm@{first}, sha256 ")
        second = hub.repos["org/rm"].commit({"README.md": b"the same bundle under another commit"})
        hub.log.clear()
        key = {"Authorization": "Bearer secret"}
        assert httpx.post(f"{server.url}/v1/reload", headers=key, timeout=30).status_code == 200
        assert httpx.get(f"{server.url}/v1/models", headers=key).json()["data"][0]["id"] == "rm"
        assert hub.files("HEAD")[0] == "reward.json"
        assert second in {path.split("/")[4] for _, path, _ in hub.log}


def test_what_is_in_the_cache_is_loaded_without_the_hub(hub: Hub, tmp_path: Path, rewards: bytes) -> None:
    commit = hub.add("org/rm", FILES)
    expected = load(hub, tmp_path, "hf://org/rm")
    assert expected == f"hf://org/rm@{commit} {rewards.hex()}\n"
    assert load(hub, tmp_path, "hf://org/rm", HF_HUB_OFFLINE="1") == expected
    assert load(hub, tmp_path, "hf://org/rm", HF_ENDPOINT=NOBODY) == expected
    refused = rewardrt(hub, tmp_path, "score", "hf://org/rm", "in.jsonl", "--precision", "half", HF_HUB_OFFLINE="1")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        f"error: hf://org/rm@{commit}: not all of it is in the cache ({tmp_path}/hf/hub), and HF_HUB_OFFLINE forbids to "
        "ask for it; unset HF_HUB_OFFLINE\n"
    )


MANY = """
import json, os, sys, time, warnings
from rewardrt import RewardModel, RewardRTError
time.sleep = lambda seconds: None  # between the tries of huggingface_hub
for name, token in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    try:
        RewardModel.load(name)
        print("loaded")
    except RewardRTError as error:
        print(type(error).__name__, error)
"""


def refusals(hub: Hub, home: Path, *asked: tuple[str, str], **changes: str) -> list[str]:
    """Return one line for each name that is loaded with a token or without."""
    done = python(hub, home, MANY, json.dumps(asked), HF_HUB_VERBOSITY="error", **changes)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(asked)
    return lines


def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("org/rm", FILES)
    hub.add("org/private", FILES, private=True)
    hub.add("org/gated", FILES, gated=True)
    hub.add("org/checkpoint", {"config.json": b"{}", "model.safetensors": b""})
    hub.add("org/data", {"README.md": b"x"})
    hub.add("org/half", {name: data for name, data in FILES.items() if name != "tokenizer.json"})
    log_in = "set HF_TOKEN, or run `hf auth login`"
    assert refusals(
        hub, tmp_path, ("hf://org/none", ""), ("hf://org/none", GOOD_TOKEN), ("hf://org/private", ""),
        ("hf://org/private", GOOD_TOKEN), ("hf://org/rm@v9", ""), ("hf://org/gated", GOOD_TOKEN),
        ("hf://org/checkpoint@main", ""), ("hf://org/data", ""), ("hf://org/half", ""), ("hf://org/rm", "hf_bad"),
        ("hf://x", ""),
    ) == [
        f"HubError hf://org/none: no such repository at {hub.url}, or it is private: {log_in}",
        f"HubError hf://org/none: no such repository at {hub.url}, or your token may not read it",
        f"HubError hf://org/private: no such repository at {hub.url}, or it is private: {log_in}",
        "loaded",
        "HubError hf://org/rm@v9: the repository has no revision 'v9'; expected a branch, a tag or a commit",
        f"HubError hf://org/gated: gated: accept its terms at {hub.url}/org/gated first, then {log_in}",
        "BundleError hf://org/checkpoint@main: is no bundle (it has no reward.json), but a checkpoint; export it: "
        "rewardrt export org/checkpoint@main BUNDLE",
        "BundleError hf://org/data: is no bundle (it has no reward.json)",
        f"BundleError hf://org/half@{hub.repos['org/half'].refs['main']}: has no tokenizer.json, which its reward.json "
        "lists; its owner has to push it again",
        f"HubError hf://org/rm: {hub.url} does not know the token; {log_in}",
        "HubError hf://x: expected hf://ORG/NAME or hf://ORG/NAME@REVISION, as in the address of a model's page",
    ]  # fmt: skip
    assert commit == hub.repos["org/rm"].refs["main"]
    hub.failing = 503
    assert refusals(hub, tmp_path, ("hf://org/rm", "")) == [
        f"HubError hf://org/rm: {hub.url} has a fault of its own (HTTP 503); try again later"
    ]
    (nobody,) = refusals(hub, tmp_path, ("hf://org/rm", ""), HF_ENDPOINT=NOBODY)
    assert nobody == (
        f"HubError hf://org/rm: the connection to {NOBODY} failed ([Errno 111] Connection refused); check network, proxy "
        "and HF_ENDPOINT, then run the same again: files that came whole are kept"
    )


@pytest.mark.parametrize(
    "name", ["hf://", "hf://x", "hf:///y", "hf://a/", "hf://a/b/c", "hf://a/..", "hf://../b", "hf://a b/c", "hf://a/b@",
             "hf://a/b@../../x", "hf://a/b@/etc", "hf://a/b@x y", "hf://a/b\n", "hf://a/b--c", "hf://-a/b", "hf://a/é",
             "hf://a/b@x..y", "hf://a\\b"]
)  # fmt: skip
def test_malformed_names_are_refused_before_anything_is_asked(name: str) -> None:
    with pytest.raises(HubError, match="expected hf://ORG/NAME or hf://ORG/NAME@REVISION"):
        RewardModel.load(name)


def test_names_and_paths_are_told_apart(tmp_path: Path) -> None:
    assert names.parse("org/name") is None
    assert names.parse(tmp_path / "hf") is None
    for form in ("hf://org/na.me_1@refs/pr/3", Path("hf://org/na.me_1@refs/pr/3")):
        assert names.parse(form) == names.Repository("org/na.me_1", "refs/pr/3")
    commit = "0123456789abcdef" * 2 + "01234567"
    folder = tmp_path / "models--org--name" / "snapshots" / commit
    assert names.name_of(folder) == f"org/name@{commit}"
    assert names.name_of(tmp_path / "models--org--name" / "snapshots") == "snapshots"


TWICE = """
import sys
import huggingface_hub.constants
from rewardrt import RewardModel, RewardRTError
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 4096  # for 10 MB, which no file here has
try:
    RewardModel.load(sys.argv[2])
except RewardRTError as error:
    print(error)
"""


def test_a_download_that_breaks_off_in_the_middle_goes_on_there(hub: Hub, tmp_path: Path, rewards: bytes) -> None:
    commit = hub.add("org/rm", FILES)
    hub.drops["model.onnx.data"] = 1
    # By itself; with older releases of huggingface_hub (0.27, 1.0) in the next call.
    said = python(hub, tmp_path, TWICE, "", "hf://org/rm").stdout
    assert said == "" or said.endswith("then run the same again: files that came whole are kept\n")
    assert load(hub, tmp_path, "hf://org/rm") == f"hf://org/rm@{commit} {rewards.hex()}\n"
    asked = [wanted for how, path, wanted in hub.log if how == "GET" and path.endswith("/model.onnx.data")]
    assert asked[0] is None and len(asked) == 2
    begun = int(str(asked[1]).removeprefix("bytes=").partition("-")[0])
    assert 0 < begun <= len(FILES["model.onnx.data"]) // 2


def test_a_download_that_keeps_breaking_off_says_so_and_the_next_call_keeps_what_came_whole(
    hub: Hub, tmp_path: Path, rewards: bytes
) -> None:
    commit = hub.add("org/rm", FILES)
    hub.drops["model.onnx.data"] = 1000
    (line,) = refusals(hub, tmp_path, (f"hf://org/rm@{commit}", ""))
    assert line.startswith(f"HubError hf://org/rm@{commit}: the connection to {hub.url} failed (")
    assert line.endswith("then run the same again: files that came whole are kept")
    hub.drops.clear()
    hub.log.clear()
    assert load(hub, tmp_path, f"hf://org/rm@{commit}").endswith(f"{rewards.hex()}\n")
    assert hub.files("GET") == ["model.onnx.data"]


def tampered(name: str, data: bytes) -> dict[str, bytes]:
    return FILES | {name: data}


def test_what_is_not_what_the_manifest_says_is_refused(hub: Hub, tmp_path: Path) -> None:
    weights = bytearray(FILES["model.onnx.data"])
    weights[-1] ^= 1
    manifest = json.loads(FILES["reward.json"])
    outside = {**manifest, "files": [*manifest["files"], {"path": "../../x", "bytes": 1, "sha256": "0" * 64}]}
    beyond = {**manifest, "files": [*manifest["files"], {"path": "huge.bin", "bytes": 10**15, "sha256": "0" * 64}]}
    commits = {
        "org/changed": hub.add("org/changed", tampered("model.onnx.data", bytes(weights))),
        "org/longer": hub.add("org/longer", tampered("tokenizer.json", FILES["tokenizer.json"] + b" ")),
        "org/outside": hub.add("org/outside", tampered("reward.json", json.dumps(outside).encode())),
        "org/beyond": hub.add("org/beyond", tampered("reward.json", json.dumps(beyond).encode())),
        "org/nothing": hub.add("org/nothing", tampered("reward.json", b"[]")),
    }

    def place(name: str) -> str:
        return f"{tmp_path}/hf/hub/models--{name.replace('/', '--')}/snapshots/{commits[name]}"

    def remedy(name: str) -> str:
        return (
            f"delete {tmp_path}/hf/hub/models--{name.replace('/', '--')} to download it anew; if that does not help, the "
            "repository's files are not those that were exported"
        )

    size = len(FILES["tokenizer.json"])
    found = refusals(hub, tmp_path, *((f"hf://{name}", "") for name in commits))
    assert found == [
        f"BundleError {place('org/changed')}/model.onnx.data: its SHA-256 is not the manifest's; the file was changed: "
        f"{remedy('org/changed')}",
        f"BundleError {place('org/longer')}/tokenizer.json: {size + 1} bytes, the manifest says {size}; "
        f"{remedy('org/longer')}",
        f"BundleError {place('org/outside')}/reward.json: path '../../x' leaves the bundle's folder",
        "loaded",  # what nothing reads is not downloaded
        f"BundleError {place('org/nothing')}/reward.json: format version None, this runtime reads 1 to 2; export the "
        "checkpoint again",
    ]
    asked = [path for how, path, _ in hub.log if how == "GET"]
    assert not any(Path(path).name == "x" or "huge" in path for path in asked)
    done = python(hub, tmp_path, "import sys; from rewardrt import RewardModel; RewardModel.load(sys.argv[1], check_hashes=False)", "hf://org/beyond")  # fmt: skip
    assert done.stderr.splitlines()[-1].endswith(
        "check_hashes=False is for folders; what was downloaded is always checked"
    )


def test_a_disk_that_is_full_is_named(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/rm", FILES)
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n{COMMAND}"
    done = python(hub, tmp_path, limited, "verify", "hf://org/rm", "--precision", "fp32")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        f": cannot be kept in {tmp_path}/hf/hub (File too large); make room there, or name another folder by HF_HOME"
    )
    assert len(done.stderr.splitlines()) == 1


def test_without_a_name_huggingface_hub_is_not_imported_and_without_it_the_extra_is_named(
    hub: Hub, tmp_path: Path
) -> None:
    program = f"""
import sys
from rewardrt import RewardModel, RewardRTError
RewardModel.load({str(BUNDLE)!r}, provider="cpu").score(text="a")
print("huggingface_hub" in sys.modules)
def why():
    try:
        RewardModel.load("hf://org/rm")
    except RewardRTError as error:
        print(type(error).__name__, error)
sys.modules["huggingface_hub"] = None
why()
del sys.modules["huggingface_hub"]
import huggingface_hub
huggingface_hub.__version__ = "0.26.5"
why()
"""
    done = python(hub, tmp_path, program)
    assert done.stdout.splitlines() == [
        "False",
        "MissingExtraError the Hub needs huggingface_hub (import of huggingface_hub halted; None in sys.modules): "
        "pip install -U 'rewardrt[hub]'",
        "MissingExtraError the Hub needs huggingface_hub 0.27 or later, found 0.26.5: pip install -U 'rewardrt[hub]'",
    ], done.stderr
    assert hub.log == []


def push_here(*arguments: object) -> tuple[int, str, str]:
    """Run `rewardrt push` in this process, which asks nobody; return status, output, and what was wrong."""
    result = CliRunner().invoke(push, [*map(str, arguments)])
    wrong = result.exception if not isinstance(result.exception, SystemExit) else result.stderr
    return result.exit_code, result.stdout, str(wrong or "")


def test_a_pushed_bundle_is_loaded_again_and_its_card_is_made_of_the_manifest(
    hub: Hub, tmp_path: Path, rewards: bytes
) -> None:
    shutil.copytree(BUNDLE, tmp_path / "bundle")
    (tmp_path / "bundle" / "notes.txt").write_text("not of the bundle")
    pushed = rewardrt(hub, tmp_path, "push", "bundle", "me/rm", "--private", "--message", "first", HF_TOKEN=GOOD_TOKEN)
    repo = hub.repos["me/rm"]
    commit = repo.refs["main"]
    assert (pushed.returncode, pushed.stdout) == (0, f"{hub.url}/me/rm\nhf://me/rm@{commit}\n")
    assert pushed.stderr == "pushing 10 files, 0.4 MB, to hf://me/rm; golden.jsonl holds the texts that were certified on\n"  # fmt: skip
    assert (repo.private, repo.messages) == (True, ["first"])
    files = repo.commits[commit]
    assert files.keys() == FILES.keys() | {".gitattributes", "README.md"}
    assert {name: files[name] for name in FILES} == FILES
    assert load(hub, tmp_path, "hf://me/rm", HF_TOKEN=GOOD_TOKEN) == f"hf://me/rm@{commit} {rewards.hex()}\n"
    hub.log.clear()
    assert push_here(tmp_path / "bundle", "me/rm", "--show-card") == (0, files["README.md"].decode(), "")
    assert hub.log == []

    # Somebody edits the card: it stays, on a new branch too, until a new one is asked for.
    repo.commit({"README.md": b"mine"})
    again = rewardrt(hub, tmp_path, "push", "bundle", "hf://me/rm", "--revision", "v2", HF_TOKEN=GOOD_TOKEN)
    assert again.stdout.splitlines()[1] == f"hf://me/rm@{repo.refs['v2']}"
    assert repo.commits[repo.refs["v2"]]["README.md"] == b"mine"
    assert repo.messages[1] == "openrlhf, llama, exported with rewardrt"
    rewardrt(hub, tmp_path, "push", "bundle", "me/rm", "--new-card", HF_TOKEN=GOOD_TOKEN)
    assert repo.commits[repo.refs["main"]]["README.md"] == files["README.md"]


def test_what_may_not_be_pushed_is_not(hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(BUNDLE, tmp_path / "bundle")
    hub.add("me/public", {"a": b""})

    def refused(*arguments: object, **changes: str) -> str:
        done = rewardrt(hub, tmp_path, "push", *arguments, **changes)
        assert (done.returncode, done.stdout) == (2, "")
        return done.stderr.splitlines()[-1]

    assert refused("bundle", "me/public", "--private", HF_TOKEN=GOOD_TOKEN) == (
        "error: hf://me/public: is there already and is public, so nothing was uploaded; make it private in its "
        "settings, or leave out --private"
    )
    assert refused("bundle", "me/rm") == f"error: hf://me/rm: {hub.url} asks for a token: set HF_TOKEN, or run `hf auth login`"  # fmt: skip
    assert hub.uploaded == {}
    hub.log.clear()


def test_what_is_wrong_with_a_push_is_said_before_the_hub_is_asked(tmp_path: Path) -> None:
    shutil.copytree(BUNDLE, tmp_path / "bundle")
    (tmp_path / "bundle" / "tokenizer.json").write_bytes(FILES["tokenizer.json"][::-1])
    for said, *arguments in (
        ("its SHA-256 is not the manifest's", tmp_path / "bundle", "me/rm"),
        ("me: expected ORG/NAME", BUNDLE, "me"),
        ("me/rm@a and --revision b: expected ORG/NAME", BUNDLE, "me/rm@a", "--revision", "b"),
        ("give the repository to push to", BUNDLE),
        ("hf://me/rm: push takes the folder of a bundle", "hf://me/rm", "me/other"),
    ):
        status, output, error = push_here(*arguments)
        assert (status != 0, output) == (True, "")
        assert said in error


def test_a_card_says_what_the_manifest_does() -> None:
    from rewardrt.bundle.card import model_card
    from rewardrt.bundle.manifest import read_bundle

    bundle = read_bundle(BUNDLE)
    card = model_card(bundle, "me/rm")
    head, body = card.removeprefix("---\n").split("\n---\n")
    assert head.splitlines() == [
        "library_name: rewardrt", "pipeline_tag: text-classification", "tags:", "- reward-model", "- onnx", "- rewardrt",
        "- openrlhf", "- llama", "# license: the checkpoint's own; fill it in, nothing here knows it",
    ]  # fmt: skip
    for expected in (
        "28,224 parameters, of the family `openrlhf`",
        "| longest text | 512 tokens;",
        "The head, one linear layer, reads the hidden state at the last token.",
        "Normalised, on request, it is (reward - 0.5) / 2.",
        "| `fp32` | any machine; as torch computes | 0.1 | 1.8e-06 | 100.0% | 29 texts |",
        "| `int8` | CPUs with avx512_vnni or avx_vnni or dotprod;",
        "| `half` | GPUs: cuda, tensorrt;",
        "pip install 'rewardrt[cpu,hub]'",
        "rewardrt score hf://me/rm rows.jsonl",
        'rm = RewardModel.load("hf://me/rm")',
        "Fill in `license` at the top of this file.",
    ):
        assert expected in body


def _with(bundle: Any, checkpoint: str, family: str) -> Any:
    from dataclasses import replace

    manifest = bundle.manifest
    origin = replace(manifest.provenance, checkpoint=checkpoint)
    return replace(bundle, manifest=replace(manifest, provenance=origin, spec=replace(manifest.spec, family=family)))


def test_a_card_names_base_models_of_the_hub_and_no_markup_of_the_manifest_is_obeyed() -> None:
    from rewardrt.bundle.card import model_card
    from rewardrt.bundle.manifest import read_bundle

    commit = "0" * 40
    bundle = read_bundle(BUNDLE)
    card = model_card(_with(bundle, f"org/adapter@{commit} on other/base@{commit}", "qwen3-reranker"), "me/rm")
    assert "pipeline_tag: text-ranking\nbase_model:\n- org/adapter\n- other/base\ntags:\n" in card
    hostile = model_card(_with(bundle, "a|b<script>\n---\n", 'x: "y"\nz'), "me/rm")
    assert hostile.count("\n---\n") == model_card(bundle, "me/rm").count("\n---\n")
    assert "<script>" not in hostile and "a\\|b&lt;script>" in hostile
