"""The tensors of a checkpoint folder by name; each is read from disk only when it is needed.

This module knows files, not models: it does not know what a tensor is for.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import safetensors
import torch

from rewardrt.errors import CheckpointError
from rewardrt_export.source.foreign import describe_foreign
from rewardrt_export.source.text_files import check_pointer, read_json

# The index comes first: if it exists, it lists every shard, and a single weights file next to it is left over.
SAFETENSORS_INDEX, SAFETENSORS_FILE = "model.safetensors.index.json", "model.safetensors"
BIN_INDEX, BIN_FILE = "pytorch_model.bin.index.json", "pytorch_model.bin"
# Heads that are saved in files of their own next to the model, each as a state dict.
HEAD_LAYER_FILES = ("regression_layer.pt", "gating_layer.pt")
# Parts of names added by torch.compile, FSDP and activation checkpointing, and the prefix added by DataParallel.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_FRONT = re.compile(r"(module\.)+(?=[^.]+\.)")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk. `read()` returns it in its stored dtype; nothing is kept in memory between calls."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Find the tensors of a checkpoint folder, including those of heads in files of their own.

    The names of the latter begin with the file's stem. Prefixes added by wrappers such as torch.compile are removed.
    Raises CheckpointError if there are no weights, a shard is missing, a file is damaged, an index disagrees with its
    shards, or two files contain the same name.
    """
    stored = _plain(_read_model(folder), folder)
    for path in (folder / name for name in HEAD_LAYER_FILES if (folder / name).is_file()):
        head = {f"{path.stem}.{name}": tensor for name, tensor in read_file(path).items()}
        head = {name: replace(tensor, name=name) for name, tensor in head.items()}
        twice = sorted(stored.keys() & head.keys())
        if twice:
            raise CheckpointError(f"{path}: holds tensors that the model's own files hold too: {shorten(twice)}")
        stored |= head
    return stored


def _read_model(folder: Path) -> dict[str, StoredTensor]:
    """Read safetensors first (sharded or not), then `pytorch_model.bin`."""
    for index_name, file_name, read in (
        (SAFETENSORS_INDEX, SAFETENSORS_FILE, _read_safetensors),
        (BIN_INDEX, BIN_FILE, _read_bin),
    ):
        if (folder / index_name).is_file():
            return _read_shards(folder, index_name, read)
        if (folder / file_name).is_file():
            return read(folder / file_name)
    raise CheckpointError(describe_foreign(folder))


def check_weights(folder: Path) -> None:
    """Raise CheckpointError for a folder without weights, saying what it contains instead."""
    if not any((folder / name).is_file() for name in (SAFETENSORS_INDEX, SAFETENSORS_FILE, BIN_INDEX, BIN_FILE)):
        raise CheckpointError(describe_foreign(folder))


def read_file(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file: safetensors if its name ends so, else a file written by `torch.save`."""
    return _plain(_read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path), path)


def _plain(stored: dict[str, StoredTensor], place: Path) -> dict[str, StoredTensor]:
    """Remove wrappers' parts from the names. Raises CheckpointError if the save lacks the other processes' parts."""
    empty = sorted(name for name, tensor in stored.items() if tensor.shape == (0,))
    if empty:
        raise CheckpointError(
            f"{place}: {len(empty)} tensors are empty ({shorten(empty, 3)}): a DeepSpeed ZeRO-3 save, for which the "
            "processes' parts were not gathered; set stage3_gather_16bit_weights_on_model_save and save again, or run "
            "zero_to_fp32.py, which lies beside the training's checkpoints"
        )
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        plain = _WRAPPERS.sub("", name)
        if front := _FRONT.match(plain):
            plain = plain[front.end() :]
        if plain in found:
            raise CheckpointError(f"{place}: {found[plain].name} and {name} are both the model's {plain}; remove one")
        found[plain] = tensor
    return {name: replace(tensor, name=name) for name, tensor in found.items()}


def _read_shards(
    folder: Path, index_name: str, read: Callable[[Path], dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    weight_map = read_json(folder / index_name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / index_name}: no `weight_map`; the index is damaged")
    shards = sorted({str(shard) for shard in weight_map.values()})
    missing = [shard for shard in shards if Path(shard).name != shard or not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} of {len(shards)} shards missing: {', '.join(missing)}")
    found = {name: tensor for shard in shards for name, tensor in read(folder / shard).items()}
    if found.keys() != weight_map.keys():
        odd = sorted(found.keys() ^ weight_map.keys())
        raise CheckpointError(
            f"{folder / index_name}: index and shards disagree about {len(odd)} tensors: {shorten(odd)}"
        )
    return found


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    check_pointer(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            shapes = {name: tuple(header.get_shape()) for name, header in headers.items()}
            dtypes = {name: _SAFETENSORS_DTYPES.get(header.get_dtype()) for name, header in headers.items()}
    except (safetensors.SafetensorError, OSError, struct.error) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); copy it again") from error
    odd = [f"{name} ({headers[name].get_dtype()})" for name, dtype in dtypes.items() if dtype is None]
    if odd:
        raise CheckpointError(f"{path}: tensors of a type that cannot be exported (quantized?): {shorten(odd)}")

    def reader(name: str) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            with safetensors.safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
            return tensor

        return read

    return {name: StoredTensor(name, shapes[name], dtype, reader(name)) for name, dtype in dtypes.items() if dtype}


_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                       "I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool, "U8": torch.uint8,
                       "I8": torch.int8, "I16": torch.int16, "F8_E4M3": torch.float8_e4m3fn,
                       "F8_E5M2": torch.float8_e5m2}  # fmt: skip


def _read_bin(path: Path) -> dict[str, StoredTensor]:
    check_pointer(path)
    try:
        # weights_only, because unpickling somebody else's file could run any code.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises pickle, zip, runtime and OS errors for damaged or unsafe files
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path}: not loadable with torch.load(weights_only=True): {reason}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected a state dict of tensors")
    return {
        str(name): StoredTensor(str(name), tuple(tensor.shape), tensor.dtype, partial(_give, tensor))
        for name, tensor in state.items()
    }


def _give(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def first_line(error: BaseException) -> str:
    """Return another library's error message on one line, or the error's type if there is no message."""
    said = " ".join(str(error).split())
    return said[:300] if said else type(error).__name__


def shorten(names: list[str], limit: int = 6) -> str:
    """Join tensor names for a message; of many names, only the first few."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
