"""What the doctor sees, what it advises, and how it says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rewardrt.bundle.spec import from_json, to_json
from rewardrt.checks import doctor
from rewardrt.checks.doctor import Package, ProviderReport, Report, examine, format_report
from rewardrt.errors import ProviderError
from rewardrt.machine import processor
from rewardrt.machine.processor import Processor

CPU = Processor("A CPU", ("avx2", "avx512f"), 8, 8, None)
WORKS = (ProviderReport("cpu", True, None),)


def test_this_machine_is_ready() -> None:
    report = examine()
    assert report.ok
    assert report.providers[0] == ProviderReport("cpu", True, None)
    assert [item.name for item in report.providers] == ["cpu", "cuda", "tensorrt"]
    assert report.conflicts == ()
    assert {item.name for item in report.packages if item.required} >= {"numpy", "tokenizers", "jinja2", "onnxruntime"}
    assert 1 <= report.processor.usable_cores <= report.processor.logical_cores


def test_the_report_is_json() -> None:
    report = examine()
    assert from_json(Report, json.loads(json.dumps(to_json(report)))) == report


def test_torch_is_looked_up_and_never_imported() -> None:
    code = (
        "import sys; from rewardrt.checks.doctor import examine; names = [item.name for item in examine().packages]; "
        "print('torch' in names, [name for name in ('torch', 'transformers', 'rewardrt_export') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("True []\n", "")


def test_without_onnxruntime_nothing_can_be_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ProviderError("no onnxruntime is installed: `pip install 'rewardrt[cpu]'`")

    monkeypatch.setattr(doctor, "import_onnxruntime", missing)
    monkeypatch.setattr(doctor, "onnxruntime_distributions", dict)
    report = examine()
    assert not report.ok
    assert [item.works for item in report.providers] == [False, False, False]
    assert report.advice[0] == "no onnxruntime is installed: `pip install 'rewardrt[cpu]'`"
    assert "result             cannot score here" in format_report(report).splitlines()


def test_a_conflict_is_not_ok_even_where_the_cpu_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "onnxruntime_conflict", lambda: "two in one folder")
    report = examine()
    assert not report.ok
    assert report.conflicts == ("two in one folder",)


def test_a_missing_package_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_REQUIRED", ("numpy", "no-such-package"))
    report = examine()
    assert not report.ok
    assert report.advice[0] == "install what is missing: `pip install no-such-package`"


def wheel(monkeypatch: pytest.MonkeyPatch, available: list[str], no_gpu: str | None) -> None:
    monkeypatch.setattr(
        doctor, "import_onnxruntime", lambda: SimpleNamespace(get_available_providers=lambda: available)
    )
    monkeypatch.setattr(doctor, "why_no_gpu", lambda: no_gpu)
    monkeypatch.setattr(doctor, "reinstall_command", lambda extra: f"install {extra}")


def test_a_gpu_beside_the_cpu_wheel_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(monkeypatch, ["CPUExecutionProvider"], no_gpu=None)
    advice = doctor._advice([], WORKS, CPU)
    assert advice == ("there is an NVIDIA GPU, but onnxruntime is for the CPU: `install gpu`",)


def test_no_gpu_beside_the_cpu_wheel_is_nothing_to_talk_about(monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(monkeypatch, ["CPUExecutionProvider"], no_gpu="there is no NVIDIA driver")
    assert doctor._advice([], WORKS, CPU) == ()


def test_a_gpu_wheel_without_a_gpu_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(monkeypatch, ["CUDAExecutionProvider", "CPUExecutionProvider"], no_gpu="no driver")
    advice = doctor._advice([], (*WORKS, ProviderReport("cuda", False, "no driver; install it")), CPU)
    assert advice == (
        "onnxruntime is for CUDA, which does not start: no driver; install it "
        "(the wheel for the CPU alone is smaller: `install cpu`)",
    )


def test_a_container_limit_below_the_cores_gives_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    wheel(monkeypatch, ["CPUExecutionProvider"], no_gpu="no driver")
    advice = doctor._advice([], WORKS, Processor("A CPU", (), 8, 8, 2.5))
    assert advice == ("the container may use 2.5 of 8 cores, which onnxruntime does not see: set threads to 2",)


def test_instruction_sets_are_read_on_each_system() -> None:
    x86 = (
        "processor\t: 0\nmodel name\t: Xeon\nflags\t\t: fpu avx avx2 avx512f avx512_vnni amx_int8\nbugs\t\t: avx_vnni\n"
    )
    assert processor._linux_instruction_sets(x86) == ("avx2", "avx512f", "avx512_vnni", "amx_int8")
    assert processor._model_name(x86) == "Xeon"
    arm = "processor\t: 0\nFeatures\t: fp asimd evtstrm asimddp sve i8mm bf16\nCPU part\t: 0xd40\n"
    assert processor._linux_instruction_sets(arm) == ("asimd", "dotprod", "i8mm", "bf16", "sve")
    assert processor._model_name(arm) is None
    mac = "machdep.cpu.brand_string: Apple M3\nhw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_BF16: 0\n"
    assert processor._macos_instruction_sets(mac) == ("dotprod",)
    assert processor._model_name(mac) == "Apple M3"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_container_limit_is_read(tmp_path: Path, files: dict[str, str], cores: float | None) -> None:
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert processor._cpu_limit(tmp_path) == cores


def test_the_text_is_aligned() -> None:
    report = Report(
        ok=True,
        rewardrt="0.1.0",
        python="CPython 3.11.7 (/bin/python)",
        platform="Linux",
        packages=(Package("numpy", "2.4.6", True), Package("torch", None, False)),
        providers=(ProviderReport("cpu", True, None), ProviderReport("tensorrt", False, "no driver")),
        processor=Processor("A CPU", None, 8, 4, 2.0),
        kernels="rounding, products",
        telemetry="off: nothing leaves this machine",
        conflicts=(),
        advice=("set threads to 2",),
    )
    assert format_report(report).splitlines() == [
        "rewardrt           0.1.0",
        "python             CPython 3.11.7 (/bin/python)",
        "platform           Linux",
        "numpy              2.4.6",
        "torch              not installed",
        "processor          A CPU",
        "  instructions     unknown",
        "  cores            8 logical, 4 usable, limited to 2",
        "int8 kernels       rounding, products",
        "telemetry          off: nothing leaves this machine",
        "provider cpu       works",
        "provider tensorrt  no: no driver",
        "advice             set threads to 2",
        "result             ready to score",
    ]
