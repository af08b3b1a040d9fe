"""The layout is the data's path: a module imports only from its left, and the runtime never imports the export."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rewardrt

ROOT = Path(__file__).parent.parent
FOLDERS = {"rewardrt": ROOT / "runtime" / "rewardrt", "rewardrt_export": ROOT / "export" / "rewardrt_export"}
# Modules, and packages with their modules, each left of everything that may import it. docs/architecture.md says why.
ORDER = {
    "rewardrt": """
        telemetry display errors forks steps
        machine: processor denormals gpu engine_cache plugins providers kernels
        graph: graph_file shapes engine session
        bundle: hub spec certificate reference_data precisions folder manifest engines opening card
        text: template_limits chat_template items rendering taps tokens fields rows
        scoring: scored source batching prefix runner pairwise answers
        reward_model
        data: strict_json formats lines outputs compression arrays inputs columns column_writers readers selection files shards journal output_formats tables jobs pieces
        evaluate: results measures layouts answers judgebench processbench rewardbench rewardbench2 rm_bench benchmarks sources scoring statistics subject comparison evaluation run summary
          charts report normalise
        ray
        checks: workers workload bench doctor verify
        server: options problem access address body turns isolation engine models schema call connection log metrics state vocabulary
          chat cohere kserve llamafactory openrlhf own sglang slime tei vllm routes views openapi request app reload process
        client: address wire servers batches
        reward_client
        trainers: reward areal ms_swift openrlhf slime trl verifiers verl listing
        cli: fault toplevel output progress engine_options options table warm bench doctor inspect normalize push score_files score evaluate serve trainer verify app
    """,
    "rewardrt_export": """
        places workplace
        source: foreign text_files weights adapter_config adapters chat_template directions layouts config multimodal padding tokenizer tokenizer_files
          tokenizer_loader folder repository
        token_options
        model: length_limits two_way logits layer_by_layer backbone heads
        families: draft encoder objectives openrlhf sequence_classification gated general_preference ldl linear_heads
          language_model_head lm_row mlp_head pair_preference pairrm process urm value_head token_logit rerankers guards
          listing
        checkpoint explain
        tracing: attention_masks bidirectional attention experts complex_numbers state_layers graphs signature trace whole_vectors lower
        precisions: calibrate functions operators nodes pool fuse_attention fuse rounding smoothing quantize storage half dense_experts tensorrt engine table writing
        certificate: memory golden encode published_class reference certify
        pipeline cli
    """,
}
PROTOCOLS = {"chat", "cohere", "kserve", "llamafactory", "openrlhf", "own", "sglang", "slime", "tei", "vllm"}
FORBIDDEN_IN_RUNTIME = {
    "torch",
    "transformers",
    "rewardrt_export",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "optimum",
    "safetensors",
}
# The one module, or package, that may import a library.
HOMES = {
    "onnxruntime": "rewardrt.machine.providers",
    "tokenizers": "rewardrt.text.tokens",
    "jinja2": "rewardrt.text",
    "click": "rewardrt.cli",
    "starlette": "rewardrt.server",
    "uvicorn": "rewardrt.server",
    "prometheus_client": "rewardrt.server.metrics",
    "pyarrow": "rewardrt.data",
    "tqdm": "rewardrt.cli.progress",
    "huggingface_hub": "rewardrt.bundle.hub",
    "ray": "rewardrt.ray",
    "httpx2": "rewardrt.client.servers",
    "matplotlib": "rewardrt.evaluate.charts",
}


def in_order(package: str) -> list[str]:
    """Return the dotted names of a package's modules, left first."""
    names, folder = [], ""
    for line in ORDER[package].strip().splitlines():
        indent = len(line) - len(line.lstrip())
        head, colon, rest = line.strip().partition(": ")
        if indent <= 8:
            folder = f".{head}" if colon else ""
        names += [f"{package}{folder}.{name}" for name in (rest if colon else head).split()]
    return names


def modules(package: str) -> dict[str, Path]:
    """Return every module of a package by its dotted name; a package's own is that of its folder."""
    root = FOLDERS[package]
    found = {}
    for path in sorted(root.rglob("*.py")):
        name = ".".join((package, *path.relative_to(root).with_suffix("").parts))
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules("rewardrt") | modules("rewardrt_export")


def imported(path: Path) -> set[str]:
    """Return the dotted names that a module imports, anywhere in it: modules of this project, and other libraries."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in MODULES else node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            names |= {value.value for value in node.args if isinstance(value, ast.Constant)}
    return names


@pytest.mark.parametrize("package", ORDER)
def test_every_module_stands_in_the_order_and_imports_only_from_its_left(package: str) -> None:
    order, found = in_order(package), modules(package)
    packages = {name for name, path in found.items() if path.name == "__init__.py"}
    assert sorted(order) == sorted(found.keys() - packages)
    entries = {".".join(name.split(".")[:2]) for name in order}
    assert packages - {package} <= entries, "packages are one level deep"
    for position, name in enumerate(order):
        used = {other for other in imported(found[name]) if other.split(".")[0] == package}
        wrong = used - set(order[:position]) - packages
        assert not wrong, f"{name} imports {wrong} from its right"
        # What a package's own module holds may be used by those to its right only, too.
        right = {".".join(other.split(".")[:2]) for other in order[position:]} - {".".join(name.split(".")[:2])}
        assert not used & packages & right, f"{name} imports a package to its right"


@pytest.mark.parametrize("name", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_a_package_gives_names_on_and_has_no_code(name: str) -> None:
    """But two: the version and the public names of the runtime, and the table of families."""
    if name == "rewardrt_export.families":
        return
    for node in ast.parse(MODULES[name].read_text(encoding="utf-8")).body:
        assert isinstance(node, ast.Expr | ast.ImportFrom | ast.Assign), f"{name}: {ast.unparse(node)[:80]}"


def test_no_module_uses_the_private_names_of_another() -> None:
    found = []
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = set()  # modules of this project, by the name they have here
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ORDER:
                own |= {a.asname or a.name for a in node.names if f"{node.module}.{a.name}" in MODULES}
                found += [f"{name}: {node.module}.{a.name}" for a in node.names if a.name.startswith("_")]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in own:
                found += [f"{name}: {node.value.id}.{node.attr}"] if node.attr.startswith("_") else []
    assert [line for line in found if "__version__" not in line] == []


def test_the_runtime_never_imports_torch_or_the_export() -> None:
    for name, path in modules("rewardrt").items():
        roots = {used.split(".")[0] for used in imported(path)}
        assert not roots & FORBIDDEN_IN_RUNTIME, name


def test_the_command_and_the_table_of_families_need_no_torch() -> None:
    """`rewardrt families` and `rewardrt export --help` answer at once, and where the export's libraries are absent."""
    absent = "".join(f"sys.modules[{name!r}] = None\n" for name in sorted(FORBIDDEN_IN_RUNTIME - set(FOLDERS)))
    code = f"import sys\n{absent}import rewardrt_export.cli, rewardrt_export.families.listing\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == ""
    assert done.returncode == 0


@pytest.mark.parametrize("library", HOMES)
def test_a_library_has_one_home(library: str) -> None:
    users = {
        name for name, path in modules("rewardrt").items() if library in {used.split(".")[0] for used in imported(path)}
    }
    home = HOMES[library]
    assert users, "nothing imports it any more"
    assert {name for name in users if name != home and not name.startswith(f"{home}.")} == set()


def test_protocols_share_a_vocabulary_and_not_each_other() -> None:
    for protocol in PROTOCOLS:
        used = {name.removeprefix("rewardrt.server.") for name in imported(MODULES[f"rewardrt.server.{protocol}"])}
        assert not used & PROTOCOLS, protocol


@pytest.mark.slow  # imports the export
def test_every_step_of_the_walks_in_the_documentation_is_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for heading, package in (("One row", "rewardrt"), ("One checkpoint", "rewardrt_export")):
        walk = text.partition(f"### {heading}")[2].partition("```")[2].partition("```")[0]
        steps = re.findall(r"\b(?:[a-z_]+\.)+[A-Za-z_.]+", walk.replace("ir.Model", ""))
        assert len(steps) >= 9
        for step in steps:
            parts = step.split(".")
            module = next(
                name for length in range(len(parts), 0, -1)
                if (name := ".".join((package, *parts[:length]))) in MODULES
            )  # fmt: skip
            found = importlib.import_module(module)
            for name in parts[module.count(".") :]:
                found = getattr(found, name)


def test_the_file_map_of_the_readme_names_every_folder_and_no_other() -> None:
    text = (
        (ROOT / "README.md")
        .read_text(encoding="utf-8")
        .partition("## File map")[2]
        .partition("```")[2]
        .partition("```")[0]
    )
    for package, folder in FOLDERS.items():
        lines = text.partition(f"/{package}/")[2].partition("\n")[2].splitlines()
        own = [line.split("  ")[1] for line in lines[: next(i for i, line in enumerate(lines) if line[0] != " ")]]
        named = {name.strip() for entry in own for name in entry.split(",")}
        assert {name for name in named if name.endswith("/")} == {
            f"{path.name}/" for path in folder.iterdir() if path.is_dir() and (path / "__init__.py").exists()
        }
        assert all((folder / name).exists() for name in named)


def test_a_module_of_more_than_300_lines_is_explained() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    explained = text.partition("### Modules of more than 300 lines")[2].partition("\n#")[0]
    for name, path in MODULES.items():
        if path.read_text(encoding="utf-8").count("\n") > 300:
            assert f"`{name.partition('.')[2]}`" in explained, name


def test_the_folders_above_the_packages_are_no_packages() -> None:
    assert not (ROOT / "export" / "__init__.py").exists()
    assert not (ROOT / "runtime" / "__init__.py").exists()


def test_the_public_names_are_these() -> None:
    results = ["Ranked", "Scored", "ScoredAnswers", "ScoredPair"]
    errors = ["BundleError", "InferenceError", "MissingExtraError", "ProviderError", "RewardRTError", "RowError"]
    errors += ["HubError", "ServerError"]
    expected = sorted(["RewardClient", "RewardModel", *results, *errors, "TruncationWarning"])
    assert sorted(rewardrt.__all__) == expected
    assert all(hasattr(rewardrt, name) for name in expected)
