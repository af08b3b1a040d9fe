"""What a graph reads beside itself is listed and hashed, and comes from where links lead to."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from rewardrt import RewardModel
from rewardrt.bundle.manifest import read_bundle
from rewardrt.errors import BundleError
from rewardrt.graph.graph_file import _FIELDS, external_files, resolve
from rewardrt.graph.session import GraphSession
from rewardrt.machine.processor import read_processor

BUNDLE = Path(__file__).parent / "bundles" / "version-1"
GRAPHS = ("model.onnx", "model.half.onnx", "model.int8.onnx")
ROWS = [{"prompt": "Name a colour.", "response": answer} for answer in ("Blue.", "No.", "Seven")]


def hub_cache(folder: Path) -> Path:
    """Lay out the bundle as the Hub's cache: every file is a link to a blob that is named by its hash."""
    snapshot = folder / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    for path in BUNDLE.iterdir():
        blob = folder / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def one_folder_an_object(folder: Path) -> Path:
    """Lay it out as git-annex and DVC do: every object lies in a folder of its own, and links are absolute."""
    work = folder / "work"
    work.mkdir(parents=True)
    for path in BUNDLE.iterdir():
        blob = folder / "objects" / hashlib.sha256(path.read_bytes()).hexdigest() / "data"
        blob.parent.mkdir(parents=True)
        shutil.copy(path, blob)
        (work / path.name).symlink_to(blob)
    return work


def linked(suffix: str) -> Callable[[Path], Path]:
    """Lay it out with links for the files of this ending alone."""

    def lay_out(folder: Path) -> Path:
        shutil.copytree(BUNDLE, folder / "bundle")
        (folder / "store").mkdir()
        for path in sorted((folder / "bundle").glob(f"*{suffix}")):
            path.rename(folder / "store" / path.name)
            path.symlink_to(f"../store/{path.name}")
        return folder / "bundle"

    return lay_out


def folder_linked(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "link").symlink_to(BUNDLE)
    return folder / "link"


def kubernetes(folder: Path) -> Path:
    """Lay it out as a mounted volume: files are links through a link to a folder, inside the mount."""
    shutil.copytree(BUNDLE, folder / "..2026_01")
    (folder / "..data").symlink_to("..2026_01")
    for path in BUNDLE.iterdir():
        (folder / path.name).symlink_to(f"..data/{path.name}")
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "the Hub's cache": hub_cache,
    "one folder an object": one_folder_an_object,
    "the weights are links": linked(".data"),
    "the graphs are links": linked(".onnx"),
    "the manifest is a link": linked("reward.json"),
    "the folder is a link": folder_linked,
    "a mounted volume": kubernetes,
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("precision", ["fp32", "half", "int8"])
def test_a_bundle_of_links_gives_the_rewards_of_the_plain_one(tmp_path: Path, name: str, precision: str) -> None:
    needs = next(item.needs for item in read_bundle(BUNDLE).manifest.variants if item.precision == precision)
    if needs and not set(needs) & set(read_processor().instruction_sets or ()):
        pytest.skip(f"this processor has no {' or '.join(needs)}")
    plain = RewardModel.load(BUNDLE, provider="cpu", precision=precision).score_many(ROWS)
    found = RewardModel.load(LAYOUTS[name](tmp_path / "layout"), provider="cpu", precision=precision).score_many(ROWS)
    assert found.tobytes() == plain.tobytes()


def test_links_out_of_the_folder_are_for_checked_hashes_only(tmp_path: Path) -> None:
    folder = hub_cache(tmp_path / "hub")
    with pytest.raises(BundleError, match="a link that leaves the bundle's folder, for which the hashes have to be"):
        RewardModel.load(folder, provider="cpu", check_hashes=False)
    RewardModel.load(kubernetes(tmp_path / "volume"), provider="cpu", check_hashes=False)  # its links stay inside
    blob = (folder / "model.onnx.data").resolve()
    data = bytearray(blob.read_bytes())
    data[100] ^= 1
    blob.write_bytes(data)
    with pytest.raises(BundleError, match="its SHA-256 is not the manifest's"):
        RewardModel.load(folder, provider="cpu")


def moved(folder: Path, name: str, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change a graph of the bundle, and vouch for it."""
    model = onnx.load(folder / name, load_external_data=False)
    change(model)
    (folder / name).write_bytes(model.SerializeToString())
    manifest = json.loads((folder / "reward.json").read_text())
    for record in manifest["files"]:
        if record["path"] == name:
            record["bytes"] = (folder / name).stat().st_size
            record["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "reward.json").write_text(json.dumps(manifest))


def name_all(location: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location

    return change


def add_node(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("EPContext", [], ["x"], domain="com.microsoft", ep_cache_context="f"))


def hidden_in(place: str) -> Callable[[onnx.ModelProto], None]:
    """Have a tensor in an attribute, a subgraph, a function or a sparse tensor name a file."""

    def change(model: onnx.ModelProto) -> None:
        tensor = TensorProto(name="w", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="other.data")
        constant = helper.make_node("Constant", [], ["c"], value=tensor)
        if place == "attribute":
            model.graph.node.append(constant)
        elif place == "subgraph":
            branch = helper.make_graph([constant], "g", [], [])
            model.graph.node.append(helper.make_node("If", ["b"], ["x"], then_branch=branch, else_branch=branch))
        elif place == "function":
            model.functions.append(helper.make_function("d", "f", [], ["c"], [constant], []))
        elif place == "tensors":
            model.graph.node.append(helper.make_node("X", [], ["x"], values=[tensor]))
        else:
            model.graph.sparse_initializer.add().values.CopyFrom(tensor)

    return change


UNLISTED: dict[str, Callable[[onnx.ModelProto], None]] = {
    "another file": name_all("other.data"),
    "a file above": name_all("../other.data"),
    "a file that is listed for another graph": name_all("model.half.onnx.data"),
    "a file that is listed for another use": name_all("golden.jsonl"),
    "an absolute path": name_all("/etc/hostname"),
    "the same file by another path": name_all("./model.onnx.data"),
    "onnxruntime's name for an address in memory": name_all("*/_ORT_MEM_ADDR_/*"),
    "no name": name_all(""),
    **{
        f"in a {place}": hidden_in(place) for place in ("attribute", "subgraph", "function", "tensors", "sparse tensor")
    },
}


@pytest.mark.parametrize("name", UNLISTED)
@pytest.mark.parametrize("check_hashes", [True, False])
def test_a_graph_may_read_no_file_but_its_own_weights(tmp_path: Path, name: str, check_hashes: bool) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(BUNDLE, folder)
    shutil.copy(folder / "model.onnx.data", folder / "other.data")
    shutil.copy(folder / "model.onnx.data", tmp_path / "other.data")
    moved(folder, "model.onnx", UNLISTED[name])
    with pytest.raises(BundleError) as caught:
        RewardModel.load(folder, provider="cpu", precision="fp32", check_hashes=check_hashes)
    assert "model.onnx: reads " in str(caught.value)
    assert "which the manifest does not list as its weights" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_graph_with_an_operator_that_reads_files_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(BUNDLE, folder)
    moved(folder, "model.onnx", add_node)
    with pytest.raises(BundleError, match="the operator EPContext, which reads files that no manifest can vouch for"):
        read_bundle(folder)


def test_the_fields_that_are_followed_are_all_that_lead_to_a_files_name() -> None:
    messages = onnx.onnx_ml_pb2.DESCRIPTOR.message_types_by_name
    leads = {"TensorProto"}
    while (
        more := {
            name
            for name, message in messages.items()
            if any(field.message_type is not None and field.message_type.name in leads for field in message.fields)
        }
        - leads
    ):
        leads |= more
    expected = {
        name.removesuffix("Proto"): {
            field.number: field.message_type.name.removesuffix("Proto")
            for field in messages[name].fields
            if field.message_type is not None and field.message_type.name in leads
        }
        for name in leads
    }
    expected["Tensor"] = {messages["TensorProto"].fields_by_name["external_data"].number: "Entry"}
    assert expected == _FIELDS


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_with_other_names_is_otherwise_the_same(tmp_path: Path, name: str) -> None:
    folder = one_folder_an_object(tmp_path / "store")
    data, where = resolve(folder / name)
    assert isinstance(data, bytes) and where is not None
    before, after = onnx.load(BUNDLE / name, load_external_data=False), onnx.load_from_string(data)
    (old,) = external_files(BUNDLE / name)
    entries = [entry for tensor in after.graph.initializer for entry in tensor.external_data if entry.key == "location"]
    entries += [
        entry for function in after.functions for node in function.node for attribute in node.attribute
        for entry in attribute.t.external_data if entry.key == "location"
    ]  # fmt: skip
    assert {(where / entry.value).read_bytes() for entry in entries} == {(BUNDLE / old).read_bytes()}
    for entry in entries:
        entry.value = old
    assert after == before


def test_weights_in_several_files_come_from_several_folders(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((2, 2), dtype=np.float32) for _ in range(2)]
    tensors = []
    for index, value in enumerate(values):
        tensor = TensorProto(name=f"w{index}", data_type=1, dims=[2, 2], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=f"w{index}.data")
        tensors.append(tensor)
        (tmp_path / f"store{index}" / "x").mkdir(parents=True)
        value.tofile(tmp_path / f"store{index}" / "x" / "blob")
    nodes = [helper.make_node("MatMul", ["x", "w0"], ["y"]), helper.make_node("MatMul", ["y", "w1"], ["z"])]
    info = [helper.make_tensor_value_info(name, 1, [2, 2]) for name in ("x", "z")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", info[:1], info[1:], tensors),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "g.onnx").write_bytes(model.SerializeToString())
    for index in range(2):
        (tmp_path / "work" / f"w{index}.data").symlink_to(f"../store{index}/x/blob")
    data, folder = resolve(tmp_path / "work" / "g.onnx")
    assert folder == tmp_path
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.eye(2, dtype=np.float32)})
    np.testing.assert_allclose(found, values[0] @ values[1], rtol=1e-5)


def test_weights_behind_links_are_in_memory_once(tmp_path: Path) -> None:
    """As those of plain files: onnxruntime packs them, which takes their size once, and maps the file meanwhile."""
    size, layers = 1024, 24  # 96 MiB
    tensors, nodes = [], []
    (tmp_path / "store").mkdir()
    with (tmp_path / "store" / "blob").open("wb") as file:
        for layer in range(layers):
            tensor = TensorProto(name=f"w{layer}", data_type=1, dims=[size, size], data_location=TensorProto.EXTERNAL)
            for key, value in (("location", "w.data"), ("offset", str(file.tell())), ("length", str(size * size * 4))):
                tensor.external_data.add(key=key, value=value)
            np.full((size, size), 1 / size, np.float32).tofile(file)
            tensors.append(tensor)
            nodes.append(helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [f"x{layer + 1}"]))
    nodes.append(helper.make_node("Identity", ["lengths"], ["l"]))
    nodes.append(helper.make_node("Cast", ["input_ids"], ["x0"], to=1))
    nodes.append(helper.make_node("Identity", [f"x{layers}"], ["rewards"]))
    inputs = [
        helper.make_tensor_value_info("input_ids", 7, ["b", size]),
        helper.make_tensor_value_info("lengths", 7, ["b"]),
    ]
    outputs = [helper.make_tensor_value_info("rewards", 1, ["b", size])]
    order = [nodes[-2], *nodes[:layers], nodes[-3], nodes[-1]]
    model = helper.make_model(
        helper.make_graph(order, "g", inputs, outputs, tensors),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    for folder in ("plain", "links"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "g.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "plain" / "w.data").hardlink_to(tmp_path / "store" / "blob")
    (tmp_path / "links" / "w.data").symlink_to("../store/blob")
    code = (
        "import re, sys; from pathlib import Path; from rewardrt.graph.session import GraphSession\n"
        "session = GraphSession.open(Path(sys.argv[1]), 'cpu')\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    plain, links = (
        int(
            subprocess.run(
                [sys.executable, "-c", code, str(tmp_path / folder / "g.onnx")],
                capture_output=True,
                check=True,
                timeout=60,
            ).stdout
        )
        for folder in ("plain", "links")
    )
    assert abs(plain - links) < 16 * 1024  # KiB; a second copy would be 96 MiB


@pytest.mark.parametrize("cut", [0, 1, 2, 7, 100, 5000, -1])
def test_a_graph_that_is_cut_off_or_overwritten_is_refused(tmp_path: Path, cut: int) -> None:
    data = (BUNDLE / "model.onnx").read_bytes()
    for damaged in (data[:cut], data[:cut] + b"\xff" * 20 + data[cut + 20 :]):
        (tmp_path / "model.onnx").write_bytes(damaged)
        shutil.copy(BUNDLE / "model.onnx.data", tmp_path)
        if damaged != data:
            with pytest.raises(BundleError) as caught:
                GraphSession.open(tmp_path / "model.onnx", "cpu")
            assert "\n" not in str(caught.value)


def test_messages_nested_too_deeply_are_refused(tmp_path: Path) -> None:
    data = b""
    for _ in range(60):
        for tag in (0x32, 0x2A, 0x0A):  # an attribute's graph, a node's attribute, a graph's node
            data = bytes([tag]) + varint(len(data)) + data
    (tmp_path / "g.onnx").write_bytes(b"\x3a" + varint(len(data)) + data)
    with pytest.raises(BundleError, match="messages nested too deeply"):
        external_files(tmp_path / "g.onnx")


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)
