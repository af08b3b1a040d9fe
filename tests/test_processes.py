"""A loaded model in other processes: forked, spawned, sent by pickle, copied."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewardrt import RewardModel
from rewardrt.errors import BundleError, ProviderError
from rewardrt.machine.kernels import describe

pytestmark = pytest.mark.slow  # each claim starts processes that import all of scoring
BUNDLE = Path(__file__).parent / "bundles" / "version-1"
TEXTS = [f"a text of the number {number}, {'and more ' * (number % 9)}" for number in range(24)]
ROWS: list[dict[str, Any]] = [{"text": text} for text in TEXTS]
# What every program below begins with. `wait` ends a child that hangs, and says so.
START = f"""
import json, os, pickle, signal, sys, threading, time, warnings
warnings.simplefilter("ignore")  # Python 3.12 warns of a fork beside threads, which is what is tested
import numpy as np
from rewardrt import RewardModel, RewardRTError
BUNDLE = sys.argv[1]
ROWS = {ROWS!r}

def wait(child, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"

def bits(model):
    return model.score_many(ROWS).tobytes().hex()
"""


def run(
    program: str, bundle: Path = BUNDLE, *, cwd: Path | None = None, environment: dict[str, str] | None = None
) -> Any:
    """Run a program in a process of its own; return what it printed last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", START + program, str(bundle)],
        capture_output=True, text=True, check=False, timeout=90, cwd=cwd, env=os.environ | (environment or {}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return RewardModel.load(BUNDLE, provider="cpu", precision="fp32")


def rewards(model: RewardModel) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.score_many(ROWS).tobytes()


FORK = """
model = RewardModel.load(BUNDLE, provider="cpu", precision=PRECISION, threads=6, prefix_cache_mb=8)
if USED:
    expected = bits(model)
time.sleep(0.7)  # until the session's threads have gone to sleep: then what they wait on cannot be destroyed in a child
read, write = os.pipe()
child = os.fork()
if child == 0:
    os.write(write, bits(model).encode())
    os.close(write)
    grandchild = os.fork()
    if grandchild == 0:
        sys.exit(0 if bits(model) == bits(model) else 5)
    sys.exit(wait(grandchild))  # as the interpreter ends, and not by os._exit
os.close(write)
unused = os.fork()
if unused == 0:
    sys.exit(0)
dropped = os.fork()
if dropped == 0:
    import gc
    del model
    gc.collect()
    sys.exit(0)
found = os.read(read, 1 << 20).decode()
print(json.dumps([wait(child), wait(unused), wait(dropped), found == bits(model), len(found)]))
"""


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_forked_process_scores_the_same_bits_and_ends_as_does_its_own_child(precision: str, used: bool) -> None:
    found = run(FORK.replace("PRECISION", repr(precision)).replace("USED", str(used)))
    assert found == [0, 0, 0, True, 8 * len(ROWS)]


def test_a_fork_while_other_threads_score_leaves_no_lock_held_in_the_child() -> None:
    program = """
model = RewardModel.load(BUNDLE, provider="cpu", precision="fp32", prefix_cache_mb=8)
expected, stop = bits(model), threading.Event()
def score():
    while not stop.is_set():
        bits(model)
threads = [threading.Thread(target=score) for _ in range(3)]
for thread in threads:
    thread.start()
codes = []
for _ in range(12):
    child = os.fork()
    if child == 0:
        os._exit(0 if bits(model) == expected else 5)
    codes.append(wait(child))
stop.set()
for thread in threads:
    thread.join()
print(json.dumps([codes, bits(model) == expected]))
"""
    assert run(program) == [[0] * 12, True]


def test_a_lock_that_a_thread_held_at_the_fork_is_free_in_the_child() -> None:
    program = """
model = RewardModel.load(BUNDLE, provider="cpu", precision="fp32", prefix_cache_mb=8)
expected = bits(model)
with model.runner._lock, model.runner._cache._lock, model.session._reopening:
    child = os.fork()
    if child == 0:
        os._exit(0 if bits(model) == expected else 5)
    code = wait(child)
print(json.dumps([code, bits(model) == expected]))
"""
    assert run(program) == [0, True]


@pytest.mark.parametrize("parallelism", ["", "true", "false"])
def test_a_child_tokenizes_many_texts_after_the_parent_did_so_in_parallel(parallelism: str) -> None:
    program = """
model = RewardModel.load(BUNDLE, provider="cpu", precision="fp32")
items = [item for index in range(3000) for item in model.answers.parse({"text": f"{index} and some words"}).items]
expected = [text.ids.tolist() for text in model.answers.encode(items)]
child = os.fork()
if child == 0:
    sys.exit(0 if [text.ids.tolist() for text in model.answers.encode(items)] == expected else 5)
print(json.dumps(wait(child)))
"""
    assert run(program, environment={"TOKENIZERS_PARALLELISM": parallelism}) == 0


def test_a_forked_worker_of_multiprocessing_scores_the_model_that_it_inherits() -> None:
    program = """
import multiprocessing

def score(_):
    return bits(model)

model = RewardModel.load(BUNDLE, provider="cpu", precision="fp32")
expected = bits(model)
with multiprocessing.get_context("fork").Pool(2) as pool:
    found = pool.map_async(score, range(4)).get(40)
print(json.dumps([item == expected for item in found]))
"""
    assert run(program) == [True] * 4


def test_a_child_that_moved_to_another_folder_opens_the_bundle_that_was_named_by_a_relative_path() -> None:
    program = """
model = RewardModel.load("version-1", provider="cpu", precision="fp32")
expected = bits(model)
child = os.fork()
if child == 0:
    os.chdir("/")
    sys.exit(0 if bits(model) == expected else 5)
print(json.dumps(wait(child)))
"""
    assert run(program, cwd=BUNDLE.parent) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shutil.rmtree(BUNDLE)", "the bundle of a loaded model cannot be opened again: {}: expected a bundle folder, found nothing; `rewardrt export CHECKPOINT BUNDLE` makes one"),
        ("edit('created', '1999')", "{}: holds another bundle than when the model was loaded; load the model from it anew"),
        ("flip('model.onnx.data')", "the bundle of a loaded model cannot be opened again: {}/model.onnx.data: its SHA-256 is not the manifest's; the file was changed: copy the bundle again"),
    ],
)  # fmt: skip
def test_a_child_or_a_pickle_whose_bundle_is_gone_or_another_one_says_so(
    tmp_path: Path, change: str, message: str
) -> None:
    shutil.copytree(BUNDLE, tmp_path / "bundle")
    program = """
import shutil
def edit(field, value):
    manifest = json.load(open(f"{BUNDLE}/reward.json"))
    manifest["provenance"][field] = value
    json.dump(manifest, open(f"{BUNDLE}/reward.json", "w"))
def flip(name):
    data = bytearray(open(f"{BUNDLE}/{name}", "rb").read())
    data[len(data) // 2] ^= 64
    os.unlink(f"{BUNDLE}/{name}")
    open(f"{BUNDLE}/{name}", "wb").write(data)
def attempt(action):
    try:
        action()
    except RewardRTError as error:
        return [type(error).__name__, str(error)]
model = RewardModel.load(BUNDLE, provider="cpu", precision="fp32")
expected, pickled = bits(model), pickle.dumps(model)
CHANGE
read, write = os.pipe()
child = os.fork()
if child == 0:
    os.write(write, json.dumps([attempt(lambda: bits(model)), attempt(lambda: bits(model))]).encode())
    sys.exit(0)
code = wait(child)
found = json.loads(os.read(read, 1 << 20))
print(json.dumps([code, *found, attempt(lambda: pickle.loads(pickled)), bits(model) == expected]))
""".replace("CHANGE", change)
    refused = ["BundleError", message.format(tmp_path / "bundle")]
    assert run(program, tmp_path / "bundle") == [0, refused, refused, refused, True]


OPTIONS: dict[str, Any] = {
    "provider": "cpu", "precision": "half", "threads": 1, "batch_tokens": 777, "padding": True, "prefix_reuse": False,
    "prefix_cache_mb": 3, "check_hashes": False,
}  # fmt: skip


def test_a_pickle_is_small_and_gives_the_same_bits(model: RewardModel) -> None:
    pickled = pickle.dumps(model)
    assert len(pickled) < 1000
    assert rewards(pickle.loads(pickled)) == rewards(model)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_loaded_with_the_options_of_the_original(again: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BUNDLE.parent)
    original = RewardModel.load("version-1", **OPTIONS)
    monkeypatch.chdir("/")
    copied = again(original)
    assert copied is not original and copied.session is not original.session
    assert copied.bundle.path == BUNDLE
    assert {name: getattr(copied._opening.options, name) for name in OPTIONS} == OPTIONS
    assert (copied.precision, copied.session.threads, copied.runner._batch_tokens, copied.runner._padding) == (
        "half",
        1,
        777,
        True,
    )
    assert rewards(copied) == rewards(original)


def test_a_copy_has_the_precision_that_was_chosen_and_the_provider_that_was_asked_for() -> None:
    original = RewardModel.load(BUNDLE)
    assert (original._opening.options.provider, original._opening.options.precision) == ("auto", original.precision)
    assert copy.copy(original).precision == original.precision


def test_a_spawned_process_takes_a_model(model: RewardModel, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import concurrent.futures, multiprocessing, sys\n"
        "from rewardrt import RewardModel\n"
        "def score(model, rows):\n"
        "    return model.score_many(rows).tobytes().hex()\n"
        "if __name__ == '__main__':\n"
        "    model = RewardModel.load(sys.argv[1], provider='cpu', precision='fp32')\n"
        "    spawn = multiprocessing.get_context('spawn')\n"
        f"    rows = {ROWS!r}\n"
        "    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool:\n"
        "        jobs = [pool.submit(score, model, rows), pool.submit(score, model, rows)]\n"
        "        print(*[job.result(60) for job in jobs])\n"
    )
    done = subprocess.run([sys.executable, program, BUNDLE], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == [rewards(model).hex()] * 2


def test_an_error_of_a_row_comes_back_from_another_process(model: RewardModel) -> None:
    (error,) = model.score_rows([{"prompt": "no answer"}])
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))


def test_the_options_of_a_model_go_with_it(model: RewardModel) -> None:
    made = RewardModel.load(BUNDLE, provider="cpu", precision="fp32", batch_tokens=99, prefix_reuse=False)
    again = pickle.loads(pickle.dumps(made))
    assert (again.runner._batch_tokens, again.runner._prefix_reuse, again.provider) == (99, False, "cpu")
    assert np.frombuffer(rewards(again)).tolist() == np.frombuffer(rewards(model)).tolist()


def test_a_pickle_of_a_bundle_that_is_gone_names_it(tmp_path: Path) -> None:
    shutil.copytree(BUNDLE, tmp_path / "bundle")
    pickled = pickle.dumps(RewardModel.load(tmp_path / "bundle", provider="cpu"))
    (tmp_path / "bundle").rename(tmp_path / "moved")
    with pytest.raises(BundleError, match=r"^the bundle of a loaded model cannot be opened again: .*bundle: expected"):
        pickle.loads(pickled)


def test_loading_and_scoring_leave_the_users_own_arithmetic_as_it_was() -> None:
    """onnxruntime's option for denormal numbers also sets the thread that opens a session, and those it then starts."""
    found = run("""
from rewardrt.machine import denormals
tiny, half, seen = np.full(8, 1e-44, np.float32), np.float32(0.5), []
def look():
    seen.append(bool((tiny * half).any()))
look()
model = RewardModel.load(BUNDLE)
look()
bits(model)
look()
thread = threading.Thread(target=lambda: (look(), bits(model), look()))
thread.start(); thread.join()
with denormals.as_zero():
    inside = bool((tiny * half).any())
look()
print(json.dumps([seen, inside, denormals.CAN_BE_ZERO]))
""")
    assert found[0] == [True] * 6
    assert found[1] is not found[2]


SHARED = """
model = RewardModel.load(BUNDLE, provider="cpu", precision="int8", threads=1, share_weights=True)
again = pickle.loads(pickle.dumps(model))
print(json.dumps([bits(model), model.score_many(ROWS[:1]).tobytes().hex(), bits(again)]))
"""


def test_weights_are_shared_in_int8_alone_and_rewards_keep_their_bits(model: RewardModel) -> None:
    kernels = describe()
    if "AVX-512 VNNI" in kernels or "compiled" in kernels:
        with pytest.raises(ProviderError, match="share_weights needs the products among RewardRT's own kernels"):
            RewardModel.load(BUNDLE, provider="cpu", precision="int8", share_weights=True)
        pytest.skip(f"no kernels here: {kernels}")
    found, first, again = run(SHARED)
    assert found == again and found.startswith(first)  # alone, beside others, and in a copy
    shared = np.frombuffer(bytes.fromhex(found), dtype=np.float32)
    plain = np.frombuffer(rewards(RewardModel.load(BUNDLE, provider="cpu", precision="int8")), dtype=np.float32)
    assert np.abs(shared - plain).max() < 0.02 * plain.std()
    copied = pickle.loads(pickle.dumps(RewardModel.load(BUNDLE, provider="cpu", precision="int8", share_weights=True)))
    assert copied._opening.options.share_weights
    assert describe() == kernels  # which are those of a model that shares nothing
    with pytest.raises(BundleError, match="share_weights is for an int8 graph on a CPU; this is the fp32 graph on cpu"):
        RewardModel.load(BUNDLE, provider="cpu", precision="fp32", share_weights=True)
