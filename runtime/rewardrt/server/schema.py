"""The part of JSON Schema that the protocols' bodies need: a checker, for the same schemas that OpenAPI shows.

One description serves both, so the document always agrees with the server.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from rewardrt.server.problem import Problem

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
STRINGS: Schema = {"type": "array", "items": STRING}
OBJECT: Schema = {"type": "object", "additionalProperties": True}
NOTHING: Schema = {"type": "null"}
# The other fields of a message are checked with the row, as in offline scoring.
MESSAGES: Schema = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "role": STRING,
            "content": {"anyOf": [STRING, {"type": "null"}, {"type": "array", "items": OBJECT}]},
        },
        "required": ["role"],
        "additionalProperties": True,
    },
}
_NAMES = {
    "string": str,
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}

_PLAIN = {"string": str, "integer": int, "boolean": bool}


def body(required: dict[str, Schema] | None = None, **optional: Schema) -> Schema:
    """Return the schema of an object without other fields; the optional fields may be null."""
    properties = (required or {}) | {name: nullable(schema) for name, schema in optional.items()}
    return {
        "type": "object",
        "properties": properties,
        "required": sorted(required or {}),
        "additionalProperties": False,
    }


def nullable(schema: Schema) -> Schema:
    """Return the schema that also accepts null."""
    return {"anyOf": [schema, {"type": "null"}]}


def only(*values: Any) -> Schema:
    """Return the schema of a field of which only these values are supported; others would change the scores."""
    return {"enum": list(values)}


def array(items: Schema, **limits: int) -> Schema:
    """Return the schema of a list."""
    return {"type": "array", "items": items, **limits}


def check(value: Any, schema: Schema, where: str = "body") -> None:
    """Raise Problem("validation") naming the first field that does not follow the schema."""
    if "anyOf" in schema:
        _check_any(value, schema["anyOf"], where)
        return
    if "enum" in schema:
        if not any(value == known and type(value) is type(known) for known in schema["enum"]):
            expected = " or ".join(json.dumps(known) for known in schema["enum"])
            _refuse(where, expected, _shown(value))
        return
    kind = schema.get("type")
    if kind is not None and not _is(value, kind):
        _refuse(where, kind, _kind_of(value))
    if kind == "object":
        _check_object(value, schema, where)
    elif kind == "array":
        _check_limits(len(value), schema.get("minItems"), schema.get("maxItems"), where, "items")
        if _all_are(value, schema.get("items", {})):
            return
        for index, item in enumerate(value):
            check(item, schema.get("items", {}), f"{where}[{index}]")
    elif kind in ("integer", "number"):
        _check_limits(value, schema.get("minimum"), schema.get("maximum"), where, "")
    elif kind == "string":
        _check_limits(len(value), schema.get("minLength"), schema.get("maxLength"), where, "characters")


def _all_are(values: list[Any], schema: Schema) -> bool:
    """Whether all values have a plain type without further rules; a quick test of the whole list."""
    if schema not in (STRING, INTEGER, BOOLEAN):
        return False
    return set(map(type, values)) <= {_PLAIN[schema["type"]]}


def _check_limits(value: float, least: float | None, most: float | None, where: str, unit: str) -> None:
    if least is not None and value < least:
        _refuse(where, f"at least {least} {unit}".rstrip(), str(value)[:40])
    if most is not None and value > most:
        _refuse(where, f"at most {most} {unit}".rstrip(), str(value)[:40])


def _check_object(value: dict[str, Any], schema: Schema, where: str) -> None:
    properties = schema.get("properties", {})
    prefix = "" if where == "body" else f"{where}."
    for name in schema.get("required", ()):
        if name not in value:
            raise Problem("validation", f"{prefix}{name}: expected this field, found none")
    for name, item in value.items():
        if name in properties:
            check(item, properties[name], f"{prefix}{name}")
        elif schema.get("additionalProperties") is False:
            known = ", ".join(properties)
            raise Problem(
                "validation", f"{prefix}{name[:80]}: not a field that is understood here; expected only {known}"
            )


def _check_any(value: Any, choices: list[Schema], where: str) -> None:
    problems = []
    for choice in choices:
        try:
            check(value, choice, where)
        except Problem as problem:
            problems.append((_is(value, choice.get("type", "")), problem))
        else:
            return
    # Raise the most useful one: that of the choice whose type matches the value.
    raise next((problem for right_type, problem in problems if right_type), problems[0][1])


def _is(value: Any, kind: str) -> bool:
    if kind == "integer":
        return (isinstance(value, int) and not isinstance(value, bool)) or (
            isinstance(value, float) and value.is_integer()
        )
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return kind in _NAMES and isinstance(value, _NAMES[kind])


def _kind_of(value: Any) -> str:
    return next((name for name in ("boolean", "integer", "number", *_NAMES) if _is(value, name)), type(value).__name__)


def _shown(value: Any) -> str:
    return json.dumps(value)[:80]


def _refuse(where: str, expected: str, found: str) -> NoReturn:
    raise Problem("validation", f"{where}: expected {expected}, found {found}")
