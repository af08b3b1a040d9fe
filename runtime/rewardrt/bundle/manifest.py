"""The bundle: a folder, and its manifest `reward.json` with the size and SHA-256 of every file in it.

The manifest is written and read only through the dataclasses below. This module runs no graph and no tokenizer. It
checks that the bundle's files exist, that they are the exported ones, and that the graphs read no other files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import NoReturn

from rewardrt.bundle.certificate import Certificate
from rewardrt.bundle.folder import MANIFEST as MANIFEST  # noqa: PLC0414 - for those that read it here
from rewardrt.bundle.folder import find_manifest
from rewardrt.bundle.precisions import current_name
from rewardrt.bundle.reference_data import ReferenceData
from rewardrt.bundle.spec import OPTIONAL, Spec, from_json, to_json
from rewardrt.errors import BundleError
from rewardrt.graph.graph_file import external_files
from rewardrt.machine.processor import read_processor

FORMAT_VERSION = 2  # version written; it goes up by 1 when a field is added that an older runtime must not ignore
OLDEST_FORMAT_VERSION = 1  # oldest version read; later fields are OPTIONAL, with a default that fits older bundles
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
GOLDEN = "golden.jsonl"
MANIFEST_BYTES = 16 * 2**20  # a larger file is refused; a real manifest has some kilobytes


@dataclass(frozen=True)
class FileRecord:
    """One file of the bundle: a plain name or a relative path with `/`, its size in bytes, its SHA-256 in hex."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Variant:
    """One graph of the bundle: its precision, and the manifest paths of the graph and of its weights.

    `needs` lists instruction sets, by the names that `rewardrt doctor` shows; a graph with `needs` is for CPUs that
    have one of them. `made_for` lists the providers on which the graph is fast; it also runs on the others. A graph
    with neither is good for any machine. `built` says what TensorRT made of the graph at export, if that was tried.
    `onnxruntime` is the oldest version that has the graph's operators, if it is newer than this package's minimum.
    """

    precision: str  # its current name, even if the file has an older one
    graph: str
    data: tuple[str, ...]
    needs: tuple[str, ...] = field(default=(), metadata={OPTIONAL: True})
    made_for: tuple[str, ...] = field(default=(), metadata={OPTIONAL: True})
    built: str = field(default="", metadata={OPTIONAL: True})
    onnxruntime: str = field(default="", metadata={OPTIONAL: True})

    def runs_on(self, provider: str, instruction_sets: Sequence[str]) -> bool:
        """Whether the graph can run on a provider, on a machine with these instruction sets.

        TensorRT runs whole graphs only, and so only graphs that were made for it.
        """
        if provider == "tensorrt":
            return provider in self.made_for
        return not self.needs or (provider == "cpu" and any(name in instruction_sets for name in self.needs))

    def suits(self, provider: str) -> bool:
        """Whether the graph is fast on this provider."""
        return not self.made_for or provider in self.made_for


@dataclass(frozen=True)
class Provenance:
    """Where the bundle came from.

    It holds names only, because paths of the exporting machine mean nothing elsewhere.
    """

    checkpoint: str
    architecture: str
    parameters: int
    stored_dtypes: tuple[str, ...]
    versions: dict[str, str]
    created: str  # UTC, ISO 8601
    # Where the checkpoint was ambiguous: what was chosen and why, by subject ("tokenizer", "family").
    choices: dict[str, str] = field(default_factory=dict, metadata={OPTIONAL: True})


@dataclass(frozen=True)
class Manifest:
    """The contents of `reward.json`."""

    format_version: int
    spec: Spec
    variants: tuple[Variant, ...]
    files: tuple[FileRecord, ...]
    provenance: Provenance
    certificates: tuple[Certificate, ...]
    uncertified: bool = field(default=False, metadata={OPTIONAL: True})  # never compared with torch: no golden texts
    # The user's data on which the spec's mean and std were measured; None: they are the checkpoint's, or there are
    # none.
    normalised_on: ReferenceData | None = field(default=None, metadata={OPTIONAL: True})


@dataclass(frozen=True)
class Bundle:
    """A folder whose manifest was read and whose files were checked.

    A bundle from the Hub has a `source`, `hf://ORG/NAME@COMMIT`. `absent` are files that its manifest lists and that
    were not downloaded, because they belong to graphs that are not used here. A plain folder has every file.
    """

    path: Path
    manifest: Manifest
    source: str = ""
    absent: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The bundle's name for people: its Hub address, or its path."""
        return self.source or str(self.path)

    @property
    def short_name(self) -> str:
        """The bundle's name without folders of this machine: its Hub address, or the folder's own name."""
        return self.source or self.path.resolve().name

    @property
    def address(self) -> str:
        """The name that opens the bundle from any working directory; that of a Hub bundle works on any machine."""
        return self.source or os.path.abspath(self.path)

    @property
    def listed(self) -> list[str]:
        """The names of all files that the manifest lists."""
        return [record.path for record in self.manifest.files]

    def file(self, name: str) -> Path:
        """Return the path of a file that the manifest lists.

        Raises BundleError if it is not listed, or was not downloaded.
        """
        if name not in self.listed:
            raise BundleError(f"{self.name}: the manifest lists no {name}")
        if name in self.absent:
            raise BundleError(f"{self.name}: {name} was not downloaded; load the precision that it belongs to")
        return self.path / name

    def needed_files(self, variants: Sequence[Variant]) -> list[str]:
        """Return the listed files that scoring with these graphs needs: theirs, and those of the text.

        The latter are the tokenizer, the chat template and the golden texts.
        """
        needed = [name for name in (TOKENIZER, CHAT_TEMPLATE, GOLDEN) if name in self.listed]
        return list(dict.fromkeys([*needed, *(name for each in variants for name in (each.graph, *each.data))]))

    def variant(self, precision: str = "auto", provider: str = "cpu") -> Variant:
        """Return the graph of this precision for a provider.

        "auto" prefers a graph made for this provider or processor (int8 on a CPU, half on a GPU), if its certificate
        says that it may stand in for float32. Otherwise it is the first exported graph that is good for any machine, or
        else one that at least runs here. Raises BundleError, naming the existing precisions, if the bundle has no such
        graph.
        """
        if precision == "auto":
            runs = self.runnable(provider)
            suited = [variant for variant in runs if variant.suits(provider)]
            special = [variant for variant in suited if variant.needs or variant.made_for]
            standing_in = [variant for variant in special if self._stands_in(variant)]
            plain = [variant for variant in suited if variant not in special]
            return (standing_in or plain or runs or self.manifest.variants)[0]
        for variant in self.manifest.variants:
            if current_name(precision) == variant.precision:
                return variant
        found = ", ".join(variant.precision for variant in self.manifest.variants)
        raise BundleError(f"{self.name}: no {precision} graph; the bundle has {found}")

    def runnable(self, provider: str) -> list[Variant]:
        """Return the graphs that a provider can run on this machine, including those made for another provider."""
        here = read_processor().instruction_sets or ()
        return [variant for variant in self.manifest.variants if variant.runs_on(provider, here)]

    def weights_bytes(self, variant: Variant) -> int:
        """Return the size of a graph's weights files in bytes."""
        return sum(record.bytes for record in self.manifest.files if record.path in variant.data)

    def _stands_in(self, variant: Variant) -> bool:
        certificate = self.certificate(variant.precision)
        return bool(certificate and certificate.fidelity and certificate.fidelity.good)

    def certificate(self, precision: str) -> Certificate | None:
        """Return the certificate of this precision, or None."""
        wanted = current_name(precision)
        return next((item for item in self.manifest.certificates if item.precision == wanted), None)


def read_bundle(path: str | Path, *, check_hashes: bool = True) -> Bundle:
    """Read a bundle's manifest and check that every listed file exists, is complete and is unchanged.

    The graphs may read no files but those listed. With `check_hashes=False` the SHA-256 values are not compared; then
    symbolic links out of the folder are refused too, because nothing else checks what they point to. Raises
    BundleError.
    """
    folder = Path(path)
    bundle = Bundle(folder, read_manifest(folder))
    check_files(bundle, bundle.listed, check_hashes=check_hashes)
    return bundle


def read_manifest(folder: Path) -> Manifest:
    """Read a bundle's manifest and check that it lists everything scoring needs, by paths inside the folder.

    Only `reward.json` is read. Raises BundleError.
    """
    path = find_manifest(folder)
    manifest = _read_manifest(path)
    for record in manifest.files:
        _check_name(path, record.path)
    needed = {TOKENIZER} | {name for variant in manifest.variants for name in (variant.graph, *variant.data)}
    if not manifest.uncertified:
        needed.add(GOLDEN)
    if manifest.spec.text.source == "chat_template":
        needed.add(CHAT_TEMPLATE)
    if missing := sorted(needed - {record.path for record in manifest.files}):
        raise BundleError(f"{path}: lists no {', '.join(missing)}; export the checkpoint again")
    if not manifest.variants:
        raise BundleError(f"{path}: has no graph; export the checkpoint again")
    return manifest


def check_files(bundle: Bundle, names: Collection[str], *, check_hashes: bool = True) -> None:
    """Check that these files exist, complete and unchanged, and that the graphs among them read no other files.

    Raises BundleError.
    """
    remedy = "copy the bundle again"
    if bundle.source:
        remedy = (
            f"delete {bundle.path.parent.parent} to download it anew; if that does not help, the repository's files "
            "are not those that were exported"
        )
    for record in bundle.manifest.files:
        if record.path in names:
            _check_file(bundle.path, record, check_hashes, remedy)
    for variant in bundle.manifest.variants:
        if variant.graph in names:
            _check_graph(bundle.path, variant)


def manifest_sha256(folder: Path) -> str:
    """Return the SHA-256 of a bundle's `reward.json` in hex, which covers all files by their hashes. Raises OSError."""
    return _sha256(folder / MANIFEST)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `reward.json`. This is the last step, because a folder with a manifest counts as a finished bundle."""
    text = json.dumps(to_json(manifest), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def record_file(folder: Path, name: str) -> FileRecord:
    """Return the record of one file of a bundle that is being written: its name, size and SHA-256."""
    path = folder / name
    return FileRecord(name, path.stat().st_size, _sha256(path))


def _read_manifest(path: Path) -> Manifest:
    try:
        size = _file_size(path)
        if size > MANIFEST_BYTES:
            raise BundleError(f"{path}: {size} bytes; expected at most {MANIFEST_BYTES}: this is no manifest")
        text = path.read_text(encoding="utf-8")
        data = json.loads(text, parse_constant=_refuse_number, parse_float=_finite)
        json.dumps(data, ensure_ascii=False).encode()  # raises if a string has a lone surrogate
    except UnicodeEncodeError as error:
        found = f"U+{ord(error.object[error.start]):04X}"
        raise BundleError(f"{path}: a string holds the lone surrogate {found}; export the checkpoint again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not readable as JSON ({error})") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise BundleError(
            f"{path}: format version {version}, this runtime reads up to {FORMAT_VERSION}; "
            "upgrade rewardrt: `pip install -U rewardrt`"
        )
    if type(version) is not int or version < OLDEST_FORMAT_VERSION:
        raise BundleError(
            f"{path}: format version {version!r}, this runtime reads {OLDEST_FORMAT_VERSION} to {FORMAT_VERSION}; "
            "export the checkpoint again"
        )
    return _with_current_names(from_json(Manifest, data, str(path)))


def _with_current_names(manifest: Manifest) -> Manifest:
    """Replace old names of precisions by the current ones: two were called otherwise in earlier bundles."""
    variants = tuple(replace(item, precision=current_name(item.precision)) for item in manifest.variants)
    certificates = tuple(replace(item, precision=current_name(item.precision)) for item in manifest.certificates)
    return replace(manifest, variants=variants, certificates=certificates)


def _check_name(manifest: Path, name: str) -> None:
    relative = PurePosixPath(name)
    if not name or relative.is_absolute() or ".." in relative.parts or "\\" in name or "\0" in name:
        raise BundleError(f"{manifest}: path {name!r} leaves the bundle's folder")


def _check_file(folder: Path, record: FileRecord, check_hash: bool, remedy: str) -> None:
    path = folder / PurePosixPath(record.path)
    if not path.exists():
        raise BundleError(f"{path}: missing; the manifest lists it: {remedy}")
    size = _file_size(path)
    if not check_hash and not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{path}: a link that leaves the bundle's folder, for which the hashes have to be checked")
    if size != record.bytes:
        raise BundleError(f"{path}: {size} bytes, the manifest says {record.bytes}; {remedy}")
    try:
        changed = check_hash and _sha256(path) != record.sha256
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error
    if changed:
        raise BundleError(f"{path}: its SHA-256 is not the manifest's; the file was changed: {remedy}")


def _check_graph(folder: Path, variant: Variant) -> None:
    """Refuse a graph that reads a file which the manifest does not list as the graph's weights."""
    beside = PurePosixPath(variant.graph).parent
    for name in sorted(external_files(folder / variant.graph)):
        if name not in {str(PurePosixPath(data).relative_to(beside)) for data in variant.data if _below(data, beside)}:
            raise BundleError(
                f"{folder / variant.graph}: reads {name!r}, which the manifest does not list as its weights; "
                "copy the bundle again, or export the checkpoint again"
            )


def _below(path: str, folder: PurePosixPath) -> bool:
    return PurePosixPath(path).is_relative_to(folder)


def _file_size(path: Path) -> int:
    """Return the size of a regular file; raise BundleError for anything else.

    A pipe or device may have no end, or block forever.
    """
    try:
        found = path.stat()
    except OSError as error:  # a link to nothing or to itself, a folder without permission
        raise BundleError(f"{path}: cannot be read ({error.strerror}); copy the bundle again") from error
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(found.st_mode), "a device")
        raise BundleError(f"{path}: expected a file, found {kind}; copy the bundle again")
    return found.st_size


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:40]} is no number that JSON can carry")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
