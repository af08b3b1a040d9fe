"""The OpenAPI document says what the server does."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.routing import Route

from rewardrt.server.app import make_app
from rewardrt.server.metrics import Metrics
from rewardrt.server.models import Models
from rewardrt.server.openapi import document
from rewardrt.server.options import ServerOptions
from rewardrt.server.state import Server
from server_process import Running, serving

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Running]:
    with serving(tiny_bundle) as running:
        yield running


def test_every_route_of_the_application_is_in_the_document(server: Running) -> None:
    """The test of the key goes by the document, too."""
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    routes = make_app(Server(Models({}), ServerOptions(), Metrics())).routes
    served = {
        (route.path, method.lower())
        for route in routes
        if isinstance(route, Route)
        for method in (route.methods or ()) - {"HEAD"}
    }
    assert served == {(path, method) for path, methods in paths.items() for method in methods}


def test_the_page_of_routes_names_every_one_and_asks_nobody(server: Running) -> None:
    answer = httpx.get(f"{server.url}/docs")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for path in document()["paths"]:
        assert f"<code>{path}</code>" in answer.text
    assert "&quot;queries&quot;" in answer.text  # the schema of a body, escaped
    assert "http://" not in answer.text
    assert "https://" not in answer.text


def test_schemathesis_finds_no_server_error_and_no_status_that_is_not_documented(
    server: Running, tmp_path: Path
) -> None:
    program = Path(sys.executable).with_name("schemathesis")
    if not program.exists() and shutil.which("schemathesis") is None:
        pytest.skip("schemathesis is not installed")
    command = [program if program.exists() else "schemathesis", "run", f"{server.url}/openapi.json"]
    # One worker: in CPython 3.11 two threads that parse Python source at once can raise a SystemError about the
    # parser's recursion depth (python/cpython#106905), and hypothesis parses source to describe its strategies.
    options = ["--checks", f"{CHECKS},unsupported_method", "--max-examples", "8", "--seed", "1", "--no-color"]
    done = subprocess.run(
        [*map(str, command), *options, "--phases", "examples,coverage,fuzzing", "--workers", "1"],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
