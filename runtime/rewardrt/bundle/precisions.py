"""The precisions that a bundle's graphs come in: what each is called, what it stores and computes in, what it is for.

Whatever asks about a precision asks here: verification for its tolerance, the export for what it is made for, help and
documentation for its words. How the export makes such a graph is in its `precisions` folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rewardrt.machine.providers import Provider

# onnxruntime's products of unsigned with signed integers overflow on an x86 processor that has neither.
INTEGER_DOT = ("avx512_vnni", "avx_vnni", "dotprod")


@dataclass(frozen=True)
class Precision:
    """One kind of graph.

    `weights` is what the backbone's matrices are stored as, `products` what they are multiplied in, `description` what
    that is good for; all three are for people.
    `tolerance_std` is how far any reward may be from torch's, in standard deviations of the rewards. A graph that
    rounds is held to what no working one comes near: how near it really is, its certificate says.
    `needs` are instruction sets, one of which a machine must have, as `rewardrt doctor` calls them. `made_for` are the
    providers that it is fast on. `held` are the bytes that a loaded graph holds in a CPU's memory for each parameter,
    about: pages of a mapped file are not counted.
    """

    name: str
    weights: str
    products: str
    description: str
    tolerance_std: float = 0.5
    rounds: bool = True  # what float32 is: the certificate then says how near it stays, beside torch's bfloat16
    calibrated: bool = False  # by texts that torch scores before, where there are any
    needs: tuple[str, ...] = ()
    made_for: tuple[Provider, ...] = ()
    held: float = 4.0
    of: str | None = None  # another precision, whose graph this one is made of, and whose file of weights it reads
    engine: bool = False  # for TensorRT, which can be asked whether it takes the graph
    shareable: bool = False  # its products, by our kernels, read weights in the mapped file
    formerly: str | None = None  # its name in older bundles and commands, which is taken everywhere


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
    """Return what a precision is called now; a name that is not known stays as it is."""
    return _FORMERLY.get(name, name)


def range_advice(name: str) -> str:
    """Return what to say of rewards of a precision that are no finite numbers, to end a message with; "" for none."""
    known = PRECISIONS.get(name)
    if known is None or known.products != "float16":
        return ""
    return f"; {name} has no numbers over 65504: score with fp32"


def in_words(names: Iterable[str]) -> str:
    """Return names as a help text lists them: `fp32, half or int8`."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last
