"""The `rewardrt` command: parse, call, print.

Results go to standard output, progress and logs to standard error. Exit status: 0, 1 (some rows failed, verification
failed), 2 (refused), 3 (a fault of ours); see `toplevel`. Commands of other packages (export) are found by entry point
and imported only when they are run.

JSON is UTF-8 whatever the terminal is. What people read is in the terminal's encoding, with an escape for what that
cannot show, and for control characters.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

import click

from rewardrt.bundle.spec import AGGREGATE_RULES, AggregateRule
from rewardrt.cli import toplevel
from rewardrt.cli.warm import engine_cache_option, engine_log, warm
from rewardrt.display import visible, visible_lines
from rewardrt.errors import RewardRTError
from rewardrt.machine.providers import PROVIDER_CHOICES, ProviderChoice

COMMANDS = "rewardrt.commands"  # the entry point group of further commands

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
_provider_option = click.option(
    "--provider",
    type=click.Choice(PROVIDER_CHOICES),
    default="auto",
    show_default=True,
    help="Execution provider. A named one is obtained or refused; auto takes CUDA where it starts, else the CPU.",
)


def provider_option(command: Any) -> Any:
    """Add --provider to a command, and with it where engines are kept."""
    return _provider_option(engine_cache_option(command))


precision_option = click.option(
    "--precision",
    default="auto",
    show_default=True,
    help="One of the bundle's graphs; auto: int8 on a CPU, half on a GPU, if its certificate allows; else the first.",
)
threads_option = click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: physical cores]")


class _Commands(click.Group):
    """The commands of this package, and those of installed packages that declare some."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_entry_points()})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        own = super().get_command(ctx, name)
        if own is not None or name not in _entry_points():
            return own
        command = _entry_points()[name].load()
        assert isinstance(command, click.Command)
        return command


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=COMMANDS)}


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="rewardrt", message="rewardrt %(version)s")
def app() -> None:
    """Export a trained reward model once; score text anywhere with onnxruntime."""


app.add_command(warm)


def main() -> None:
    """Run the command line; `toplevel` says how it ends."""
    toplevel.run(app)


@app.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("source", metavar="[INPUT.jsonl | -]", required=False)
@click.option("-o", "--output", help="Write rows here instead of standard output; moved into place at the end.")
@click.option("--prompt", help="Score one prompt instead of a file.")
@click.option("--response", "responses", multiple=True, help="An answer to --prompt; several are ranked.")
@provider_option
@precision_option
@click.option("--normalize/--raw", default=None, help="Normalised or raw rewards.  [default: as the bundle says, raw]")
@click.option("--objectives", is_flag=True, help="Add the values that the reward is made of, by name.")
@click.option(
    "--aggregate",
    type=click.Choice(AGGREGATE_RULES),
    help="One reward of those of the steps, for models that give those.",
)
@click.option("--batch-tokens", type=click.IntRange(min=1), help="Tokens in one batch, padding included.")
@click.option("--no-prefix-reuse", is_flag=True, help="Compute every text from its first token, shared or not.")
@click.option(
    "--prefix-cache-mb",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Memory for beginnings that later parts of a long file share.",
)
@threads_option
@click.option("--table", is_flag=True, help="Print answers ranked, for people, instead of JSONL rows.")
@json_option
def score(
    bundle: Path,
    source: str | None,
    output: str | None,
    prompt: str | None,
    responses: tuple[str, ...],
    provider: ProviderChoice,
    precision: str,
    normalize: bool | None,
    objectives: bool,
    aggregate: AggregateRule | None,
    batch_tokens: int | None,
    no_prefix_reuse: bool,
    prefix_cache_mb: int,
    threads: int | None,
    table: bool,
    as_json: bool,
) -> None:
    """Score JSONL rows from a file or standard input, or one --prompt with its --response.

    A row holds text, or messages, or prompt (or messages) with response, responses, steps, or chosen and rejected. It
    comes out with its rewards added, in the same order; a row that cannot be scored comes out with `error`.
    """
    from rewardrt.reward_model import RewardModel
    from rewardrt.scoring.batching import BATCH_TOKENS

    if (prompt is None) == (source is None):
        raise click.UsageError("give either an input file (or - for standard input) or --prompt with --response")
    if prompt is not None and not responses:
        raise click.UsageError("--prompt needs at least one --response")
    if responses and prompt is None:
        raise click.UsageError("--response goes with --prompt; rows of a file bring their own")
    if aggregate is not None and prompt is not None:
        raise click.UsageError("--aggregate is for rows with steps; --prompt with --response has none")
    if table and (as_json or output or prompt is not None):
        raise click.UsageError("--table prints a file's rows for people; it goes with no --json, --output or --prompt")
    with engine_log():
        model = RewardModel.load(
            bundle,
            provider=provider,
            precision=precision,
            threads=threads,
            batch_tokens=batch_tokens or BATCH_TOKENS,
            prefix_reuse=not no_prefix_reuse,
            prefix_cache_mb=prefix_cache_mb,
        )
    toplevel.say(
        f"{bundle}: {model.precision} on {model.session.runs_on}"
        + (f" ({model.session.note})" if model.session.note else "")
    )
    labels = model.spec.output.labels if objectives else ()
    if objectives and not labels:
        raise RewardRTError(f"--objectives: {bundle} has none; its reward is not made of several values")
    if prompt is not None:
        _score_prompt(model, prompt, responses, normalize, labels, output, as_json)
    else:
        assert source is not None
        _score_file(model, source, normalize, aggregate, labels, output, table)


def _score_prompt(
    model: Any,
    prompt: str,
    responses: Sequence[str],
    normalize: bool | None,
    labels: Sequence[str],
    output: str | None,
    as_json: bool,
) -> None:
    """Print the reward of one answer, the ranking of several, or with --json the row."""
    from rewardrt.data.files import open_output, to_line
    from rewardrt.scoring.pairwise import settle
    from rewardrt.text.rows import fill_row

    row: dict[str, Any] = {"prompt": prompt}
    row |= {"response": responses[0]} if len(responses) == 1 else {"responses": list(responses)}
    parsed = model.parse(row)
    results = model.score_items(parsed.items, normalize=normalize)
    for index, result in enumerate(results):
        if isinstance(result, RewardRTError):
            raise type(result)(f"{parsed.label(index)}{result}") from result
    filled = fill_row(row, parsed, settle(parsed, results), labels)
    if as_json or output:
        with open_output(output) as file:
            file.write(to_line(filled))
    elif parsed.kind == "single":
        _show("\n".join([f"{filled['reward']:.4f}", *([_objectives(filled["objectives"])] if labels else [])]))
    else:
        _show(_ranking(filled))
    _say_truncated(sum(result.truncated > 0 for result in results), len(results), model.spec.max_length)


def _score_file(
    model: Any,
    source: str,
    normalize: bool | None,
    aggregate: AggregateRule | None,
    labels: Sequence[str],
    output: str | None,
    table: bool,
) -> None:
    from rewardrt.data.files import Summary, open_output, read_lines, score_file
    from rewardrt.data.formats import jsonl_lines

    progress = _Progress()

    def score_texts(texts: Sequence[Any]) -> Any:
        return model.score_texts(texts, normalize=normalize, aggregate=aggregate)

    def show(line: bytes) -> None:
        file.write(_for_people(_describe(json.loads(line), model, objectives=bool(labels))))

    # Not closed if it is interrupted: that waits for the thread that reads, and so for a line that may never come.
    lines = _open_input(source)
    with open_output(output) as file:
        summary: Summary = score_file(
            score_texts,
            read_lines(jsonl_lines(lines, "standard input" if source == "-" else source)),
            show if table else file.write,
            prepare=model.encode,
            parse=model.parse,
            labels=labels,
            progress=progress,
        )
    lines.close()
    seconds = progress.finish()
    toplevel.say(
        f"scored {summary.scored} of {summary.rows} rows: {summary.texts} texts, {summary.tokens} tokens "
        f"in {seconds:.1f} s ({summary.tokens / max(seconds, 1e-9):.0f} tokens/s)"
    )
    _say_truncated(summary.truncated_texts, summary.texts, model.spec.max_length)
    if summary.pairs:
        share = summary.pairs_right / summary.pairs
        ties = f", {summary.ties} ties" if summary.ties else ""
        toplevel.say(
            f"accuracy {share:.4f}: chosen above rejected in {summary.pairs_right} of {summary.pairs} pairs{ties}"
        )
    for name, rows in summary.unread.items():
        toplevel.say(f"{rows} row{'s' if rows > 1 else ''} had the field `{name}`, which nothing read")
    if summary.failed:
        toplevel.say(f"{summary.failed} of {summary.rows} rows could not be scored; they have `error`")
        sys.exit(1)


def _open_input(source: str) -> BinaryIO:
    from rewardrt.data.formats import open_input

    if source != "-":
        return open_input(source)
    if sys.stdin is None:
        raise RewardRTError("standard input is closed; send it rows, or name a JSONL file")
    # Not sys.stdin.buffer: Python takes its lock when it ends, which a thread that waits for a line holds.
    return open(sys.stdin.fileno(), "rb", closefd=False)


def _describe(row: dict[str, Any], model: Any, *, objectives: bool) -> str:
    """Show one scored row to a person: its prompt, and its answers best first."""
    if "error" in row:
        return f"error: {visible(row['error'])}\n"
    if not objectives:
        row.pop("objectives", None)  # the row's own field of this name, if it has one
    shown = _shown(next((row[name] for name in ("prompt", "messages", "text", "chosen") if row.get(name)), ""))
    kind = model.parse(row).kind  # other fields than those of its kind are the row's own, whatever their names
    if kind == "ranking":
        return f"{_one_line(shown, 96)}\n{_ranking(row)}\n"
    if kind == "pair":
        pair = {
            "responses": [_shown(row["chosen"]), _shown(row["rejected"])],
            "rewards": [row["chosen_reward"], row["rejected_reward"]],
        }
        pair |= {name: row[name] for name in ("tokens", "truncated", "objectives") if name in row}
        return f"{_one_line(shown, 96)}\n{_ranking(pair)}\n"
    if model.spec.input == "steps":
        steps = row.get("steps") or [""] * len(row["step_rewards"])  # a text holds its steps itself
        lines = [
            f"{reward:9.4f}  {_one_line(step, 84)}" for step, reward in zip(steps, row["step_rewards"], strict=True)
        ]
        whole = f"{row['reward']:9.4f}  " if "reward" in row else ""
        return "\n".join([f"{whole}{_one_line(shown, 84)}", *lines]) + "\n"
    values = f"{_objectives(row['objectives'])}\n" if "objectives" in row else ""
    answer = shown if row.get("response") is None else str(row["response"])
    return f"{row['reward']:9.4f}  {_one_line(answer, 84)}\n{values}"


def _shown(value: Any) -> str:
    """Return the text of a field that is a string, or of the last message where it is a conversation."""
    return value if isinstance(value, str) else str(value[-1].get("content") or "")


def _ranking(row: dict[str, Any]) -> str:
    """Lay out a row with `responses` and `rewards` as a table, best first."""
    order = sorted(range(len(row["rewards"])), key=lambda index: -row["rewards"][index])
    lines = ["rank     reward  tokens  answer"]
    for rank, index in enumerate(order, 1):
        cut = f" [{row['truncated'][index]} tokens cut]" if row["truncated"][index] else ""
        answer = _one_line(str(row["responses"][index]), 72) + cut
        lines.append(f"{rank:4d}  {row['rewards'][index]:9.4f}  {row['tokens'][index]:6d}  {answer}")
        lines += [_objectives(row["objectives"][index])] if "objectives" in row else []
    return "\n".join(lines)


def _objectives(values: dict[str, float]) -> str:
    """Lay out one text's objectives under its line."""
    return "\n".join(f"{value:15.4f}  {visible(label)}" for label, value in values.items())


def _one_line(text: str, width: int) -> str:
    flat = " ".join(text.split())
    return visible(flat if len(flat) <= width else flat[: width - 1] + "…")


def _show(text: str) -> None:
    """Print lines for people to standard output."""
    from rewardrt.data.files import open_output

    with open_output(None) as output:
        output.write(_for_people(text))


def _for_people(text: str) -> bytes:
    return f"{visible_lines(text)}\n".encode(sys.stdout.encoding or "utf-8", "backslashreplace")


def _show_json(value: Any) -> None:
    """Print a value as JSON, for programs."""
    from rewardrt.data.files import open_output

    with open_output(None) as output:
        output.write(_json(value))


class _Progress:
    """Counts rows on a terminal's standard error; silent elsewhere."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._shown = False

    def __call__(self, summary: Any) -> None:
        if sys.stderr.isatty():
            self._shown = True
            self._write(f"\r{summary.rows} rows, {summary.tokens} tokens")

    def finish(self) -> float:
        """Clear the line, and return the seconds since the start."""
        if self._shown:
            self._write("\r\033[K")
        return time.perf_counter() - self._start

    @staticmethod
    def _write(text: str) -> None:
        with suppress(OSError):  # scoring goes on without a terminal
            click.echo(text, nl=False, err=True)


def _say_truncated(cut: int, texts: int, limit: int) -> None:
    if cut:
        toplevel.say(f"{cut} of {texts} texts were cut at {limit} tokens; `truncated` says by how much")


@app.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@provider_option
@precision_option
@threads_option
@json_option
def verify(bundle: Path, provider: ProviderChoice, precision: str, threads: int | None, as_json: bool) -> None:
    """Score the bundle's golden texts on this machine and compare with what torch gave at export.

    Exit status 1 when a reward, or a text's tokens, differ by more than the certificate allows, and 2 when the bundle
    is uncertified: there is nothing to compare with.
    """
    from rewardrt.checks.verify import verify as run
    from rewardrt.reward_model import RewardModel

    found = run(RewardModel.load(bundle, provider=provider, precision=precision, threads=threads))
    if as_json:
        _show_json(dataclasses.asdict(found) | {"passed": found.passed})
    else:
        _show(f"{bundle}: {found.texts} texts, {found.precision} on {found.provider}, against torch at export")
        for name, deviation in (("alone", found.single), ("batched", found.batched)):
            _show(
                f"  {name:8s} largest difference {deviation.max_absolute:.2e} = {deviation.max_std:.2e} "
                f"standard deviations (relative {deviation.max_relative:.2e})"
            )
        _show(f"  pair order agreement {found.pair_order_agreement:.2%}, tolerance {found.tolerance_std:g} std")
        _show("passed" if found.passed else f"FAILED: {'; '.join(found.problems)}")
    sys.exit(0 if found.passed else 1)


@app.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what is in a bundle: the model, its text rule, its files, its certificate. Checks every file's hash."""
    from rewardrt.bundle.manifest import read_bundle
    from rewardrt.bundle.spec import to_json

    manifest = read_bundle(bundle).manifest
    if as_json:
        _show_json(to_json(manifest))
        return
    _show(describe_manifest(str(bundle), manifest))


def describe_manifest(name: str, manifest: Any) -> str:
    """Lay out a manifest for a person."""
    spec, origin = manifest.spec, manifest.provenance
    rule = spec.text
    taps = ", ".join(tap.rule + (f" {list(tap.ids)}" if tap.ids else "") for tap in spec.taps)
    affine = spec.normalise
    normalise = "none in the checkpoint"
    if affine is not None:
        default = "default" if spec.normalise_by_default else "on request; raw is the default"
        normalise = f"(reward - {affine.mean:g}) / {affine.std:g}, {default}"
    steps = [_describe_source(rule)]
    steps += [_describe_steps(rule)] if rule.step_token else []
    steps += [f"strip {rule.strip_tail!r} at the end"] if rule.strip_tail else []
    steps += [f"append {rule.append_prefix + rule.append_if_missing!r} if missing"] if rule.append_if_missing else []
    steps += ["tokenizer's special tokens" if rule.add_special_tokens else "no special tokens added"]
    steps += [f"cut to {spec.max_length} tokens"]
    steps += [f"last id becomes {rule.overwrite_last}"] if rule.overwrite_last is not None else []
    named = [f"  objectives {', '.join(spec.output.labels)}"] if spec.output.labels else []
    lines = [
        f"{name}: {spec.family}, {spec.backbone}, {origin.parameters:,} parameters",
        f"  from       {origin.checkpoint} ({origin.architecture}, {', '.join(origin.stored_dtypes)}), "
        f"{origin.created}",
        f"  text       {' -> '.join(steps)}",
        f"  pooling    {taps}",
        *(f"  chosen     {name}: {choice}" for name, choice in origin.choices.items()),
        *named,
        f"  normalise  {normalise}",
    ]
    for certificate in manifest.certificates:
        worst = max(certificate.single.max_std, certificate.batched.max_std)
        lines.append(
            f"  certified  {certificate.precision}: within {worst:.1e} std of torch on {certificate.texts} texts, "
            f"pair order {certificate.pair_order_agreement:.1%} ({certificate.reference})"
        )
        if certificate.longest is not None:
            beyond = f"; not compared beyond {', '.join(certificate.beyond)}" if certificate.beyond else ""
            lines.append(f"             texts of up to {certificate.longest} tokens{beyond}")
        if certificate.fidelity is not None:
            near = certificate.fidelity
            lines.append(
                f"             rms {near.rms_std:.3f} std, pair order {near.pair_order_agreement:.1%} on {near.texts} "
                f"texts unseen in calibration (torch bfloat16: {near.bf16_rms_std:.3f}, "
                f"{near.bf16_pair_order_agreement:.1%})"
            )
    lines += [f"  built      {variant.precision}: {variant.built}" for variant in manifest.variants if variant.built]
    if not manifest.certificates:
        lines.append("  uncertified: never compared with torch (exported with --no-certify)")
    lines += [f"  {record.bytes:>13,}  {record.path}" for record in manifest.files]
    return "\n".join(map(visible, lines))


def _describe_source(rule: Any) -> str:
    if rule.source == "segments":
        return " + ".join(map(repr, rule.segments))
    if rule.format:
        return repr(rule.format) + (
            " as the user's turn of the chat template" if rule.source == "chat_template" else ""
        )
    return "chat template" if rule.source == "chat_template" else "prompt + response"


def _describe_steps(rule: Any) -> str:
    if rule.step_layout == "turns":
        return f"every step a turn of the user, answered {rule.step_token!r}"
    return f"{rule.step_token!r} after every step" + (", each by itself" if rule.step_layout == "apart" else "")


@app.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path), metavar="INPUT.jsonl")
@click.option("--rows", type=click.IntRange(min=1), help="Only the first rows of the file.  [default: all]")
@click.option("--max-length", type=click.IntRange(min=1), help="Cut texts at so many tokens.  [default: the model's]")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Times to score the file.")
@provider_option
@threads_option
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the figures to this file as well.")
def bench(
    bundle: Path,
    file: Path,
    rows: int | None,
    max_length: int | None,
    rounds: int,
    provider: ProviderChoice,
    threads: int | None,
    output: Path | None,
) -> None:
    """Measure every graph of a bundle on the rows of a file: speed, agreement with fp32, memory, latency.

    Those that were made for another provider are left out. The graphs take turns, each in a process of its own; all of
    them are in memory at once. What a GPU holds is not in the figure of memory.
    """
    from rewardrt.checks.bench import bench as run
    from rewardrt.checks.bench import format_report
    from rewardrt.data.files import open_output

    with open_output(output) if output is not None else nullcontext() as stream:  # found out now if it can be written
        report = run(
            bundle,
            file,
            rows=rows,
            max_length=max_length,
            rounds=rounds,
            provider=provider,
            threads=threads,
            progress=toplevel.say,
        )
        _show(format_report(report))
        if stream is not None:
            stream.write(_json(dataclasses.asdict(report)))


@app.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--bundle", "more", multiple=True, metavar="NAME=PATH", help="A further bundle, chosen by `model`.")
@click.option("--served-name", "names", multiple=True, help="What clients call BUNDLE.  [default: its folder's name]")
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
@click.option("--normalize/--raw", default=None, help="Normalised or raw rewards.  [default: as the bundle says, raw]")
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
    """Serve rewards over HTTP, to the clients of OpenRLHF, vLLM, SGLang, TEI, Cohere, Jina and KServe.

    The bundle is loaded once. SIGTERM and SIGHUP answer what was accepted, and new requests with 503, before it ends;
    SIGUSR1 and POST /v1/reload load it anew.
    """
    bundles = [_named_bundle(value) for value in more]
    if bundle is not None:
        bundles.insert(0, (names or (bundle.resolve().name,), bundle))
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
        from rewardrt.server.options import ServerOptions
        from rewardrt.server.process import Address
        from rewardrt.server.process import serve as run
    except ModuleNotFoundError as error:
        from rewardrt.errors import MissingExtraError

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


@app.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show what is installed, which providers really start here, and what to do about the rest."""
    from rewardrt.bundle.spec import to_json
    from rewardrt.checks.doctor import examine, format_report

    report = examine()
    _show_json(to_json(report)) if as_json else _show(format_report(report))
    sys.exit(0 if report.ok else 1)


def _json(value: Any) -> bytes:
    try:
        return f"{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:  # a lone surrogate, of a folder's name for one: only an escape can carry it
        return f"{json.dumps(value, indent=2)}\n".encode()
