"""The OpenAPI document, made from the tables that the server itself uses, and the same as a web page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from html import escape
from typing import Any

from rewardrt.data.lines import to_line
from rewardrt.server.call import COMMON_STATUS, Scoring
from rewardrt.server.routes import RELOAD, ROUTES, ScoringRoute
from rewardrt.server.state import Server
from rewardrt.server.views import JSON, PAGE_POLICY, VERSION, VIEWS, View, ViewAnswer

_PROBLEM = {"description": "Refused or failed, with the reason in the protocol's own body."}


def document() -> dict[str, Any]:
    """Return the document, which is the same for every server of this version."""
    paths: dict[str, Any] = {route.path: {"post": _post(route)} for route in ROUTES}
    paths[RELOAD] = {"post": _reload()}
    for view in (*VIEWS, *DOCUMENTS):
        paths.setdefault(view.path, {})["get"] = _get(view)
    return {
        "openapi": "3.1.0",
        "info": {"title": "RewardRT", "version": VERSION, "description": "Rewards over HTTP; raw unless asked."},
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            }
        },
    }


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>RewardRT: routes</title><link rel="icon" href="data:,"><style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 900px; margin: 0 auto; padding: 16px; }}
h1 {{ font-size: 20px; }} summary {{ cursor: pointer; padding: 6px 0; overflow-wrap: anywhere; }}
details {{ border-bottom: 1px solid #8886; }} b {{ display: inline-block; width: 3.2em; }}
pre {{ overflow: auto; font-size: 13px; background: #8882; padding: 10px; border-radius: 6px; max-height: 30em; }}
</style></head><body><h1>RewardRT {version}: routes</h1>
<p>The same as <a href="openapi.json">openapi.json</a>, which programs read. <a href="./">Rank answers</a></p>
{routes}</body></html>
"""


def page() -> bytes:
    """Return the document as a self-contained HTML page."""
    routes = [
        f"<details><summary><b>{method.upper()}</b> <code>{escape(path)}</code>: {escape(operation['summary'])}"
        f"{' (needs the key, if one is set)' if operation['security'] else ''}</summary>"
        f"{_body(operation)}{_answers(operation)}</details>"
        for path, methods in document()["paths"].items()
        for method, operation in methods.items()
    ]
    return _PAGE.format(version=escape(VERSION), routes="\n".join(routes)).encode()


def _body(operation: dict[str, Any]) -> str:
    if "requestBody" not in operation:
        return ""
    return f"<p>Body</p>{_schema(operation['requestBody'])}"


def _answers(operation: dict[str, Any]) -> str:
    return "".join(
        f"<p>{status}: {escape(answer['description'])}</p>{_schema(answer)}"
        for status, answer in operation["responses"].items()
    )


def _schema(described: dict[str, Any]) -> str:
    schema = described.get("content", {}).get(JSON, {}).get("schema")
    return f"<pre>{escape(json.dumps(schema, indent=2))}</pre>" if schema else ""


def _post(route: ScoringRoute) -> dict[str, Any]:
    answers = _any_of([scoring.answer for scoring in route.scorings])
    responses: dict[str, Any] = {"200": {"description": "Scored.", "content": {JSON: {"schema": answers}}}}
    for status in sorted({status for scoring in route.scorings for status in _statuses(scoring)}):
        responses[str(status)] = _PROBLEM | {"content": {JSON: {}}}
    return _operation(route.path, "post", route.summary, True) | {
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": _any_of([scoring.body for scoring in route.scorings])}},
        },
        "responses": responses,
    }


def _reload() -> dict[str, Any]:
    summary = "Reload the bundles while the old ones are served, then swap them. Needs a server with a key."
    responses: dict[str, Any] = {"200": {"description": "Loaded.", "content": {JSON: {"schema": {"type": "object"}}}}}
    responses |= {str(status): _PROBLEM | {"content": {JSON: {}}} for status in (401, 403, 405, 500, 503)}
    return _operation(RELOAD, "post", summary, True) | {"responses": responses}


def _get(view: View) -> dict[str, Any]:
    statuses = {*view.statuses, 403, *((401,) if view.guarded else ())}
    responses = {}
    for status in sorted(statuses):
        kind = view.content_type if status == 200 else JSON if view.content_type else ""
        content: dict[str, Any] = {"content": {kind: {}}} if kind else {}
        responses[str(status)] = {"description": "Answered." if status == 200 else _PROBLEM["description"]} | content
    return _operation(view.path, "get", view.summary, view.guarded) | {"responses": responses}


def _operation(path: str, method: str, summary: str, guarded: bool) -> dict[str, Any]:
    name = path.strip("/").replace("/", "_").replace("{", "").replace("}", "") or "page"
    found: dict[str, Any] = {"operationId": f"{method}_{name}", "summary": summary}
    names = [name for name in ("model", "version") if f"{{{name}}}" in path]
    if names:
        found["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    return found | {"security": [{"bearer": []}, {"key": []}, {}] if guarded else []}


def _statuses(scoring: Scoring) -> set[int]:
    return {scoring.dialect.statuses.get(kind, status) for kind, status in COMMON_STATUS.items()}


def _any_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


@cache
def _document_bytes() -> bytes:
    return to_line(document())


_page = cache(page)


def _answer_document(server: Server, path: Mapping[str, str]) -> ViewAnswer:
    return ViewAnswer(_document_bytes())


def _answer_page(server: Server, path: Mapping[str, str]) -> ViewAnswer:
    return ViewAnswer(_page(), 200, "text/html", (("content-security-policy", PAGE_POLICY),))


# These are not in VIEWS, because their answers are made from both tables.
DOCUMENTS = (
    View("/openapi.json", _answer_document, "This document.", guarded=False, quiet=True),
    View("/docs", _answer_page, "This document, for people.", guarded=False, quiet=True, content_type="text/html"),
)
