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
@click.option(
    "--bundle", "more", multiple=True, metavar="NAME=PATH", help="A further bundle; requests choose it by `model`."
)
@click.option("--served-name", "names", multiple=True, help="The name of BUNDLE for clients.  [default: its own name]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=5000, show_default=True, help="0: any free port.")
@click.option("--uds", type=click.Path(path_type=Path), help="Listen at a unix socket instead of --host and --port.")
@click.option("--tls-cert", type=click.Path(path_type=Path), help="Serve HTTPS: the certificate (chain), PEM.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its private key, PEM.  [default: in --tls-cert]")
@click.option("--api-key", help="Key required of every client.  [environment: REWARDRT_API_KEY]")
@click.option(
    "--api-key-file", type=click.Path(path_type=Path), help="File of keys, one per line: one for each client."
)
@click.option(
    "--allow-host", "hosts", multiple=True, metavar="NAME", help="A host name of this server, for browsers and proxies."
)
@click.option("--root-path", default="", help="Path prefix that a proxy removes.")
@click.option("--forwarded-allow-ips", default="", help="Proxies whose X-Forwarded-For is trusted.  [default: none]")
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
    help="What to do with texts over the limit.",
)
@click.option(
    "--prefix-cache-mb",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Memory of each model for prefixes that later requests share, in MiB.",
)
@click.option(
    "--max-queue-tokens",
    type=click.IntRange(min=1),
    default=262_144,
    show_default=True,
    help="Most tokens in the queue; further requests wait to be accepted.",
)
@click.option(
    "--max-wait-seconds",
    type=click.FloatRange(min=0),
    default=120,
    show_default=True,
    help="How long such a request waits before it is refused.",
)
@click.option("--max-body-mb", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--max-items", type=click.IntRange(min=1), default=1024, show_default=True, help="Texts in one request.")
@click.option(
    "--max-text-chars",
    type=click.IntRange(min=1),
    help="Most characters of a text.  [default: 262144, or 8 for each token of the model's limit]",
)
@click.option("--max-connections", type=click.IntRange(min=1), default=1024, show_default=True)
@click.option(
    "--header-seconds", type=click.FloatRange(min=0.1), default=10, show_default=True, help="Time limit for a header."
)
@click.option(
    "--body-seconds", type=click.FloatRange(min=0.1), default=30, show_default=True, help="Time limit for a body."
)
@click.option(
    "--write-seconds",
    type=click.FloatRange(min=0.1),
    default=30,
    show_default=True,
    help="Time limit for a client that does not read its answer.",
)
@click.option(
    "--drain-seconds", type=click.FloatRange(min=0), default=30, show_default=True, help="Time to end after SIGTERM."
)
@click.option("--open-metrics", is_flag=True, help="Give /metrics to clients without the key.")
@click.option("--log-texts", is_flag=True, help="Write the scored texts to the log.")
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

    On SIGTERM or SIGHUP the server answers the requests that it has accepted, refuses new ones with 503, and ends. On
    SIGUSR1 or POST /v1/reload it reloads the bundle.
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
