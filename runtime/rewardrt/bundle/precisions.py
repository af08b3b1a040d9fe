"""The precisions of a bundle's graphs: their names, number formats and purposes.

All code that needs a property of a precision reads it here: verification its tolerance, the export its target, help and
documentation its description. How such a graph is made is in the export's `precisions` folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rewardrt.machine.providers import Provider

# On x86 processors without these instructions, onnxruntime's products of unsigned and signed integers overflow.
INTEGER_DOT = ("avx512_vnni", "avx_vnni", "dotprod")


@dataclass(frozen=True)
class Precision:
    """One kind of graph.

    `weights` is the format in which the backbone's matrices are stored, `products` the format in which they are
    multiplied, and `description` the purpose; all three are texts for people.

    `tolerance_std` is the largest allowed difference of any reward from torch's, in standard deviations of the rewards.
    For precisions that round it is so wide that only a broken graph exceeds it; the certificate says how close the
    graph really is.

    `needs` lists instruction sets, by the names that `rewardrt doctor` shows; the machine must have one of them.
    `made_for` lists the providers on which the graph is fast. `held` is the approximate memory of a loaded graph on a
    CPU, in bytes per parameter, without the pages of mapped files.
    """

    name: str
    weights: str
    products: str
    description: str
    tolerance_std: float = 0.5
    rounds: bool = True  # whether values are rounded below float32; the certificate then has a `fidelity`
    calibrated: bool = False  # whether calibration texts, scored by torch, decide how values are rounded
    needs: tuple[str, ...] = ()
    made_for: tuple[Provider, ...] = ()
    held: float = 4.0
    of: str | None = None  # another precision, from whose graph this one is made, and whose weights file it reads
    engine: bool = False  # for TensorRT; the export can build an engine from it as a test
    shareable: bool = False  # whether RewardRT's kernels can read its weights directly from the mapped file
    formerly: str | None = None  # its name in older bundles and commands, which is still accepted


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", "float32", "float32", "as torch computes", tolerance_std=1e-4, rounds=False),
        Precision(
            "weights-bf16",
            "bfloat16",
            "float32",
            "half the disk, and nothing lost of a bfloat16 checkpoint",
            formerly="bf16",
        ),
        Precision(
            "weights-fp16",
            "float16",
            "float32",
            "half the disk, and nothing lost of a float16 checkpoint",
            formerly="fp16",
        ),
        Precision(
            "half",
            "float16",
            "float16",
            "attention too, the rest in float32: fast on a GPU",
            made_for=("cuda",),
        ),
        Precision(
            "tensorrt",
            "float16",
            "float16",
            "half as TensorRT takes it, whole and as one engine; its weights are half's file",
            made_for=("tensorrt",),
            of="half",
            engine=True,
        ),
        Precision(
            "int8",
            "8 bits",
            "integers",
            "each token by itself: fast on a CPU",
            calibrated=True,
            needs=INTEGER_DOT,
            held=1.1,
            shareable=True,
        ),
        Precision("weights8", "8 bits", "float32", "rounded in blocks of 32: a third of the memory", held=1.4),
        Precision(
            "weights4",
            "4 bits",
            "float32",
            "rounded in blocks of 32: a sixth of the memory",
            tolerance_std=3.0,
            held=0.7,
        ),
    )
}
_FORMERLY = {precision.formerly: name for name, precision in PRECISIONS.items() if precision.formerly is not None}


def current_name(name: str) -> str:
    """Return the current name of a precision; an unknown name is returned unchanged."""
    return _FORMERLY.get(name, name)


def range_advice(name: str) -> str:
    """Return advice to append to an error about rewards that are not finite numbers; "" if there is none."""
    known = PRECISIONS.get(name)
    if known is None or known.products != "float16":
        return ""
    return f"; {name} has no numbers over 65504: score with fp32"


def in_words(names: Iterable[str]) -> str:
    """Return names as a help text lists them: `fp32, half or int8`."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last
