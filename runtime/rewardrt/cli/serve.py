"""`rewardrt serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from rewardrt.bundle import hub
from rewardrt.cli.options import example, normalize_option, precision_option, provider_option, threads_option
from rewardrt.errors import MissingExtraError
from rewardrt.machine.providers import ProviderChoice


@click.command(
    short_help="Give rewards over HTTP.",
    epilog=example("rewardrt serve bundle", "rewardrt serve bundle --port 8000 --api-key-file keys.txt"),
)
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--bundle", "more", multiple=True, metavar="NAME=PATH", help="A further bundle, chosen by `model`.")
@click.option("--served-name", "names", multiple=True, help="What clients call BUNDLE.  [default: its own name]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=5000, show_default=True, help="0: any that is free.")
@click.option("--uds", type=click.Path(path_type=Path), help="Listen at a unix socket instead of --host and --port.")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="Serve HTTPS: the certificate (chain), PEM.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its private key, PEM.  [default: in --tls-cert]")
@click.option("--api-key", help="Asked of every client.  [environment: REWARDRT_API_KEY]")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="Keys, one a line: one for each client.")
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME", help="A name that pages and proxies reach it by.")
@click.option("--root-path", default="", help="What a proxy takes off the beginning of paths.")
@click.option("--forwarded-allow-ips", default="", help="Proxies whose X-Forwarded-For is believed.  [default: none]")
@provider_option
@precision_option
@threads_option
@normalize_option
@click.option("--max-length", type=click.IntRange(min=1), help="Limit of a text in tokens.  [default: the model's]")
@click.option(
    "--overflow",
    type=click.Choice(("error", "cut")),
    default="cut",
    show_default=True,
    help="Of long texts.",
)
@click.option(
    "--prefix-cache-mb",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Memory of each model for beginnings that later requests share.",
)
@click.option(
    "--max-queue-tokens",
    type=click.IntRange(min=1),
    default=262_144,
    show_default=True,
    help="What waits; a request over it waits outside.",
)
@click.option(
    "--max-wait-seconds",
    type=click.FloatRange(min=0),
    default=120,
    show_default=True,
    help="Of such a request, at most, before it is refused.",
)
@click.option("--max-body-mb", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--max-items", type=click.IntRange(min=1), default=1024, show_default=True, help="Texts in one request.")
@click.option(
    "--max-text-chars",
    type=click.IntRange(min=1),
    help="Characters of a text.  [default: 262144, or 8 for each token of the model's limit]",
)
@click.option("--max-connections", type=click.IntRange(min=1), default=1024, show_default=True)
@click.option("--header-seconds", type=click.FloatRange(min=0.1), default=10, show_default=True, help="For a header.")
@click.option("--body-seconds", type=click.FloatRange(min=0.1), default=30, show_default=True, help="For a body.")
@click.option(
    "--write-seconds",
    type=click.FloatRange(min=0.1),
    default=30,
    show_default=True,
    help="For a client that does not read its answer.",
)
@click.option("--drain-seconds", type=click.FloatRange(min=0), default=30, show_default=True, help="After SIGTERM.")
@click.option("--open-metrics", is_flag=True, help="Give /metrics to clients without the key.")
@click.option("--log-texts", is_flag=True, help="Write what was scored to the log.")
def serve(
    bundle: Path | None,
    more: tuple[str, ...],
    names: tuple[str, ...],
    host: str,
    port: int,
    uds: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    api_key: str | None,
    api_key_file: Path | None,
    hosts: tuple[str, ...],
    root_path: str,
    forwarded_allow_ips: str,
    provider: ProviderChoice,
    precision: str,
    threads: int | None,
    normalize: bool | None,
    max_length: int | None,
    overflow: Any,
    prefix_cache_mb: int,
    max_queue_tokens: int,
    max_wait_seconds: float,
    max_body_mb: int,
    max_items: int,
    max_text_chars: int | None,
    max_connections: int,
    header_seconds: float,
    body_seconds: float,
    write_seconds: float,
    drain_seconds: float,
    open_metrics: bool,
    log_texts: bool,
) -> None:
    """Serve rewards over HTTP, to trainers and to the clients of vLLM, SGLang, TEI, Cohere, Jina and KServe.

    The bundle is loaded once. SIGTERM and SIGHUP answer what was accepted, and new requests with 503, before it ends;
    SIGUSR1 and POST /v1/reload load it anew.
    """
    bundles = [_named_bundle(value) for value in more]
    if bundle is not None:
        repository = hub.parse(bundle)
        own = bundle.resolve().name if repository is None else repository.name.partition("/")[2]
        bundles.insert(0, (names or (own,), bundle))
    elif names:
        raise click.UsageError("--served-name goes with BUNDLE; --bundle name=path brings its own")
    if not bundles:
        raise click.UsageError("give a BUNDLE, or --bundle name=path")
    if tls_key is not None and tls_cert is None:
        raise click.UsageError("--tls-key goes with --tls-cert")
    if root_path and (not root_path.startswith("/") or root_path.endswith("/")):
        raise click.UsageError(f"--root-path {root_path}: expected a path such as /rewards")
    try:
        from rewardrt.server.access import api_keys
        from rewardrt.server.address import Address
        from rewardrt.server.options import ServerOptions
        from rewardrt.server.process import serve as run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("starlette", "uvicorn", "prometheus_client"):
            raise
        raise MissingExtraError(f"serve needs {missing}: pip install 'rewardrt[serve]'") from error
    options = ServerOptions(
        api_keys=api_keys(api_key, api_key_file, os.environ),
        normalize=normalize,
        overflow=overflow,
        prefix_cache_mb=prefix_cache_mb,
        max_queue_tokens=max_queue_tokens,
        max_wait_seconds=max_wait_seconds,
        max_body_bytes=max_body_mb * 2**20,
        max_items=max_items,
        max_text_characters=max_text_chars,
        max_connections=max_connections,
        header_seconds=header_seconds,
        body_seconds=body_seconds,
        write_seconds=write_seconds,
        max_length=max_length,
        open_metrics=open_metrics,
        log_texts=log_texts,
        drain_seconds=drain_seconds,
        hosts=hosts,
        named=bool(names or more),
    )
    address = Address(host, port, uds, tls_cert, tls_key, root_path, forwarded_allow_ips)
    run(bundles, options, address, provider=provider, precision=precision, threads=threads)


def _named_bundle(value: str) -> tuple[tuple[str, ...], Path]:
    name, found, path = value.partition("=")
    if not (name and found and path):
        raise click.UsageError(f"--bundle {value}: expected name=path")
    return (name,), Path(path)
