"""Examine this machine: what is installed, which providers really start, and how to fix the others."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from dataclasses import dataclass

from rewardrt import telemetry
from rewardrt.errors import ProviderError
from rewardrt.machine import kernels
from rewardrt.machine.gpu import find_gpu
from rewardrt.machine.processor import Processor, read_processor
from rewardrt.machine.providers import (
    ORT_NAMES,
    PROVIDERS,
    Provider,
    Way,
    import_onnxruntime,
    onnxruntime_conflict,
    onnxruntime_distributions,
    reinstall_command,
    way_version,
    why_no_gpu,
    why_not,
    why_not_way,
)

_REQUIRED = ("numpy", "tokenizers", "jinja2", "click")
_EXPORT = ("torch", "transformers")  # only their metadata is read; they are not imported
_WAYS: dict[Way, str] = {"tensorrt": "by the classic provider", "tensorrt-rtx": "by the plug-in"}


@dataclass(frozen=True)
class Package:
    """A distribution, its version (None: not installed), and whether scoring requires it."""

    name: str
    version: str | None
    required: bool


@dataclass(frozen=True)
class ProviderReport:
    """Whether a provider computed a small graph correctly, or why not."""

    name: Provider
    works: bool
    reason: str | None


@dataclass(frozen=True)
class WayReport:
    """One way to TensorRT: its version (None: not installed), and why it does not run (None: it does)."""

    name: Way
    version: str | None
    reason: str | None


@dataclass(frozen=True)
class Report:
    """The result of `examine`. `ok` means that texts can be scored here, at least on the CPU."""

    ok: bool
    rewardrt: str
    python: str
    platform: str
    packages: tuple[Package, ...]
    providers: tuple[ProviderReport, ...]
    processor: Processor
    kernels: str
    telemetry: str
    conflicts: tuple[str, ...]
    advice: tuple[str, ...]
    gpu: str | None = None
    ways: tuple[WayReport, ...] = ()


def examine() -> Report:
    """Examine the installation and the machine, and run a small graph on every available provider."""
    conflict = onnxruntime_conflict()
    packages = _packages()
    providers = _providers()
    processor = read_processor()
    missing = [item.name for item in packages if item.required and item.version is None]
    gpu = find_gpu()
    return Report(
        ok=conflict is None and not missing and any(item.name == "cpu" and item.works for item in providers),
        rewardrt=_version("rewardrt") or "not installed, running from its source",
        python=f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        packages=packages,
        providers=providers,
        processor=processor,
        kernels=kernels.describe(),
        telemetry=telemetry.describe(),
        conflicts=() if conflict is None else (conflict,),
        advice=_advice(missing, providers, processor),
        gpu=None if gpu is None else f"{gpu}, CUDA {gpu.cuda}",
        ways=_ways(),
    )


def format_report(report: Report) -> str:
    """Format the report as text, one finding per line."""
    processor = report.processor
    sets = "unknown" if processor.instruction_sets is None else " ".join(processor.instruction_sets) or "none of note"
    limit = "" if processor.cpu_limit is None else f", limited to {processor.cpu_limit:g}"
    rows = [("rewardrt", report.rewardrt), ("python", report.python), ("platform", report.platform)]
    rows += [(item.name, item.version or "not installed") for item in report.packages]
    rows += [
        ("processor", processor.model),
        ("  instructions", sets),
        ("  cores", f"{processor.logical_cores} logical, {processor.usable_cores} usable{limit}"),
        ("int8 kernels", report.kernels),
        ("telemetry", report.telemetry),
    ]
    rows += [("gpu", report.gpu)] if report.gpu is not None else []
    rows += [(f"provider {item.name}", "works" if item.works else f"no: {item.reason}") for item in report.providers]
    for way in report.ways:
        installed = f"{way.version}, " if way.version is not None else ""
        rows.append((f"  {_WAYS[way.name]}", f"{installed}{'works' if way.reason is None else f'no: {way.reason}'}"))
    rows += [("conflict", text) for text in report.conflicts]
    rows += [("advice", text) for text in report.advice]
    rows += [("result", "ready to score" if report.ok else "cannot score here")]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{text}" for name, text in rows)


def _packages() -> tuple[Package, ...]:
    found = [Package(name, _version(name), required=True) for name in _REQUIRED]
    wheels = [Package(name, version, required=True) for name, version in onnxruntime_distributions().items()]
    found += wheels or [Package("onnxruntime", _version("onnxruntime"), required=False)]  # perhaps built from source
    return (*found, *(Package(name, _version(name), required=False) for name in _EXPORT))


def _providers() -> tuple[ProviderReport, ...]:
    try:
        import_onnxruntime()
    except ProviderError:
        return tuple(ProviderReport(name, False, "there is no onnxruntime that can be used") for name in PROVIDERS)
    reasons = [(name, why_not(name)) for name in PROVIDERS]
    return tuple(ProviderReport(name, reason is None, reason) for name, reason in reasons)


def _ways() -> tuple[WayReport, ...]:
    """Try each way to TensorRT separately."""
    try:
        import_onnxruntime()
    except ProviderError:
        return ()
    return tuple(WayReport(way, way_version(way), why_not_way(way)) for way in _WAYS)


def _advice(missing: list[str], providers: tuple[ProviderReport, ...], processor: Processor) -> tuple[str, ...]:
    advice = []
    if missing:
        advice.append(f"install what is missing: `pip install {' '.join(missing)}`")
    try:
        available = import_onnxruntime().get_available_providers()
    except ProviderError as error:
        advice.append(str(error))
    else:
        reasons = {item.name: item.reason for item in providers}
        if reasons["cpu"] is not None:
            advice.append(f"the CPU provider does not work: {reasons['cpu']}")
        tensorrt = "tensorrt" in reasons and reasons["tensorrt"] is None
        if ORT_NAMES["cuda"] not in available and not tensorrt and why_no_gpu() is None:
            advice.append(f"there is an NVIDIA GPU, but onnxruntime is for the CPU: `{reinstall_command('gpu')}`")
        if ORT_NAMES["cuda"] in available and reasons["cuda"] is not None:
            advice.append(
                f"onnxruntime is for CUDA, which does not start: {reasons['cuda']} "
                f"(the wheel for the CPU alone is smaller: `{reinstall_command('cpu')}`)"
            )
    if (slow := kernels.advice(processor.instruction_sets or ())) is not None:
        advice.append(slow)
    if processor.cpu_limit is not None and processor.cpu_limit < processor.usable_cores:
        threads = max(1, int(processor.cpu_limit))
        advice.append(
            f"the container may use {processor.cpu_limit:g} of {processor.usable_cores} cores, "
            f"which onnxruntime does not see: set threads to {threads}"
        )
    return tuple(advice)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
