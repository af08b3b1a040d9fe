"""The chat template of a checkpoint folder: all files in which transformers 4 and 5 store one, and which one is taken.

A tokenizer reads chat_template.jinja, the folder additional_chat_templates and tokenizer_config.json. Processors wrote
chat_template.json, or a field in processor_config.json, which the tokenizer of the same folder does not read. Ignoring
these would score such a model on its bare prompt and response, without the template that it was trained with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rewardrt.errors import CheckpointError
from rewardrt_export.source.text_files import read_json, read_text

TOKENIZER_CONFIG, JINJA, FOLDER = "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"
PROCESSOR_FILES = ("chat_template.json", "processor_config.json")
DEFAULT = "default"
FIELD = "chat_template"


def read_chat_template(folder: Path, wanted: str | None = None) -> tuple[str | None, str | None]:
    """Return the folder's chat template, if any, and a line that says which one it is if there was a choice.

    `wanted` is the name of one of several templates, or a file to read instead. Raises CheckpointError naming the file.
    """
    own = _tokenizer_templates(folder)
    others = {name: templates for name in PROCESSOR_FILES if (templates := _from_json(folder / name))}
    if wanted is not None:
        return _named(wanted, own)
    if own:
        return _choose(folder, own, others)
    for name, named in others.items():
        template, _ = _choose(folder, named, {})
        return template, f"{name}'s, a processor's file, which transformers' tokenizer alone does not read"
    return None, None


def _tokenizer_templates(folder: Path) -> dict[str, str]:
    """Return the templates that transformers' tokenizer reads, by name; separate files come before tokenizer_config."""
    found = {DEFAULT: _checked(read_text(folder / JINJA), folder / JINJA)} if (folder / JINJA).is_file() else {}
    if (folder / FOLDER).is_dir():
        paths = sorted((folder / FOLDER).glob("*.jinja"))
        found |= {path.name.removesuffix(".jinja"): _checked(read_text(path), path) for path in paths}
    return found or _from_json(folder / TOKENIZER_CONFIG)


def _from_json(path: Path) -> dict[str, str]:
    """Return the templates in a JSON file's field: a single text, a list of named ones, or an object by name."""
    if not path.is_file():
        return {}
    value = read_json(path).get(FIELD)
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: _checked(value, path)}
    if isinstance(value, list) and all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in value):
        value = {item["name"]: item.get("template") for item in value}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {FIELD} is {_kind(value)}; expected a text, or texts with names")
    return {str(name): _checked(template, path) for name, template in value.items()}


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def _checked(template: Any, path: Path) -> str:
    if not isinstance(template, str):
        raise CheckpointError(f"{path}: a chat template is {_kind(template)}; expected a text")
    if not template.strip():
        raise CheckpointError(
            f"{path}: the chat template is empty, and every text would be; remove it, or give one with --chat-template"
        )
    try:
        template.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{path}: the chat template has half of a character ({template[error.start]!a}, a lone surrogate), which "
            "no file can hold; write the whole character"
        ) from error
    return template


def _choose(folder: Path, templates: dict[str, str], others: dict[str, dict[str, str]]) -> tuple[str, str | None]:
    names = ", ".join(sorted(templates))
    if DEFAULT not in templates:
        raise CheckpointError(
            f"{folder}: {len(templates)} chat template{'s' if len(templates) > 1 else ''} with names ({names}), and "
            f"none called {DEFAULT!r}; say which one the model was trained with: --chat-template NAME, or a file of it"
        )
    template = templates[DEFAULT]
    differing = [name for name, other in others.items() if other.get(DEFAULT, template) != template]
    if differing:
        return template, f"the tokenizer's; {' and '.join(differing)} (a processor's) has another, left aside"
    return template, f"{DEFAULT!r}, of {names}" if len(templates) > 1 else None


def _named(wanted: str, templates: dict[str, str]) -> tuple[str, str]:
    if wanted in templates:
        return templates[wanted], f"{wanted!r} of {', '.join(sorted(templates))}, as --chat-template says"
    path = Path(wanted)
    if not path.is_file():
        names = f"one of {', '.join(sorted(templates))}, or a file" if templates else "a file (the checkpoint has none)"
        raise CheckpointError(f"--chat-template {wanted}: expected {names}, found neither such a name nor such a file")
    return _checked(read_text(path), path), f"the file {path.name}, as --chat-template says"
