"""A bundle whose tokenizer panics, for the tests of what one text may cost the others."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from pathlib import Path


def make_panicking(bundle: Path, target: Path) -> Path:
    """Copy a bundle, and give its tokenizer a normalizer that panics, in Rust, at every byte that is not ASCII."""
    shutil.copytree(bundle, target)
    data = json.loads((target / "tokenizer.json").read_text())
    table = base64.b64encode((512).to_bytes(4, "little") + bytes(512)).decode()
    before = [data["normalizer"]] if data["normalizer"] else []
    normalizers = [{"type": "Precompiled", "precompiled_charsmap": table}, *before]
    data["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    written = json.dumps(data).encode()
    (target / "tokenizer.json").write_bytes(written)
    manifest = json.loads((target / "reward.json").read_text())
    for record in manifest["files"]:
        if record["path"] == "tokenizer.json":
            record |= {"sha256": hashlib.sha256(written).hexdigest(), "bytes": len(written)}
    (target / "reward.json").write_text(json.dumps(manifest))
    return target
