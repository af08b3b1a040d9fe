"""The OpenAPI document, made of the tables that the server itself goes by."""

from __future__ import annotations

from typing import Any

from rewardrt.server.call import COMMON_STATUS, Scoring
from rewardrt.server.routes import ROUTES, ScoringRoute
from rewardrt.server.views import JSON, VERSION, VIEWS, View

_PROBLEM = {"description": "Refused or failed, with the reason in the protocol's own body."}


def document() -> dict[str, Any]:
    """Return the document; it is the same for every server of this version."""
    paths: dict[str, Any] = {route.path: {"post": _post(route)} for route in ROUTES}
    for view in VIEWS:
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


def _get(view: View) -> dict[str, Any]:
    statuses = {*view.statuses, *((401,) if view.guarded else ())}
    responses = {}
    for status in sorted(statuses):
        kind = view.content_type if status == 200 else JSON if view.content_type else ""
        content: dict[str, Any] = {"content": {kind: {}}} if kind else {}
        responses[str(status)] = {"description": "Answered." if status == 200 else _PROBLEM["description"]} | content
    return _operation(view.path, "get", view.summary, view.guarded) | {"responses": responses}


def _operation(path: str, method: str, summary: str, guarded: bool) -> dict[str, Any]:
    name = path.strip("/").replace("/", "_").replace("{", "").replace("}", "") or "page"
    found: dict[str, Any] = {"operationId": f"{method}_{name}", "summary": summary}
    if "{model}" in path:
        found["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return found | {"security": [{"bearer": []}, {"key": []}, {}] if guarded else []}


def _statuses(scoring: Scoring) -> set[int]:
    return {scoring.dialect.statuses.get(kind, status) for kind, status in COMMON_STATUS.items()}


def _any_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
