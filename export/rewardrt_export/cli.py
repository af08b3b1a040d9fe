"""`rewardrt export` and `rewardrt families`. Light to import: torch and transformers are imported by an export only."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rewardrt.bundle.precisions import PRECISIONS, in_words
from rewardrt.bundle.spec import POOLING_RULES, PoolingRule
from rewardrt.cli import toplevel
from rewardrt.cli.options import example
from rewardrt.cli.output import width_of
from rewardrt.errors import MissingExtraError
from rewardrt.steps import Step
from rewardrt_export.places import check_checkpoint, check_target, find_repository
from rewardrt_export.token_options import LOGIT_FUNCTIONS, LogitFunction, TokenOptions, encodable

if TYPE_CHECKING:
    from rewardrt_export.source.tokenizer import TokenizerChoice

NEEDED = ("torch", "transformers", "onnxscript", "onnx_ir", "tomlkit", "onnxruntime")


def _parse_weights(context: click.Context, option: click.Parameter, value: str | None) -> tuple[float, ...]:
    """Parse a list of numbers such as `0.5,0.3`."""
    try:
        return tuple(float(number) for number in value.split(",")) if value is not None else ()
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 0.5,0.3,-0.2") from None


def _parse_text(context: click.Context, parameter: click.Parameter, value: str) -> str:
    r"""Return a text with \n and \t replaced by a line break and a tab; `@FILE` reads it from a file."""
    if not encodable(value):
        raise click.BadParameter("expected text in UTF-8")
    if not value.startswith("@"):
        return value.replace("\\n", "\n").replace("\\t", "\t")
    try:
        return Path(value[1:]).read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{value[1:]}: cannot be read ({error})") from None


# A line for each precision: \b keeps click from filling the lines.
_PRECISIONS = "\b\nPrecisions:\n" + "\n".join(
    f"  {name}: weights {each.weights}, products {each.products}; {each.description}"
    for name, each in PRECISIONS.items()
)


_EXAMPLES = example(
    "rewardrt export CHECKPOINT bundle", "rewardrt export CHECKPOINT bundle --precision fp32 --precision int8"
)


@click.command(short_help="Make a bundle of a trained reward model.", epilog=f"{_PRECISIONS}\n\n{_EXAMPLES}")
@click.argument("checkpoint")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--base", help="The base model, if CHECKPOINT leaves it out: a folder or ORG/NAME.")
@click.option("--family", help="The checkpoint's family, if its files do not tell: one of `rewardrt families`.")
@click.option("--spec", "spec_file", type=click.Path(path_type=Path), help="TOML that describes a model of no family.")
@click.option("--tokens", default="", help="Tokens whose logits make the reward: yes,no or 9693,2152 or 1..5.")
@click.option(
    "--function",
    type=click.Choice(LOGIT_FUNCTIONS),
    help="The reward's function of the logits.  [default: one token: logit, two: difference, a range: expectation]",
)
@click.option(
    "--template",
    default="",
    callback=_parse_text,
    help="The text, with {prompt} or {query}, {response} or {document}, and {instruction}; or @FILE.",
)
@click.option("--close", default="", callback=_parse_text, help="Text to append, such as an empty think block.")
@click.option("--instruction", default="", callback=_parse_text, help="The {instruction} of rows that have none.")
@click.option("--explain", is_flag=True, help="Print the spec that would be used, with reasons, and export nothing.")
@click.option("--pooling", type=click.Choice(POOLING_RULES), help="Where the reward was read in training.")
@click.option("--pad-token", help="The token, or its id, that training padded with, if the files allow two.")
@click.option("--chat-template", help="The name of one of several chat templates, or a file.")
@click.option(
    "--max-length", type=click.IntRange(min=1), help="Tokens after which a text is cut.  [default: the model's limit]"
)
@click.option("--weights", callback=_parse_weights, help="Weight of each output of the head, as in 0.5,0.3,-0.2.")
@click.option(
    "--tokenizer",
    type=click.Choice(("file", "transformers")),
    help="Whose token ids to use if tokenizer.json and transformers disagree.  [default: file, with a note]",
)
@click.option("--normalize", is_flag=True, help="Let scoring use the checkpoint's mean and std by default.")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    help=f"Precision: {in_words(PRECISIONS)}; again for several graphs.  [default: fp32]",
)
@click.option("--token-rewards", is_flag=True, help="Also output the reward after every token, for inspection.")
@click.option("--golden", type=click.Path(path_type=Path), help="JSONL rows to certify on, at least 16 texts.")
@click.option(
    "--calibrate", type=click.Path(path_type=Path), help="JSONL rows to calibrate int8 on.  [default: golden texts]"
)
@click.option(
    "--no-certify", "certified", flag_value=False, default=True, help="Do not compare with torch, if memory is short."
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON, for programs.")
def export(
    checkpoint: str,
    bundle: Path | None,
    base: str | None,
    family: str | None,
    spec_file: Path | None,
    tokens: str,
    function: LogitFunction | None,
    template: str,
    close: str,
    instruction: str,
    explain: bool,
    pooling: PoolingRule | None,
    pad_token: str | None,
    chat_template: str | None,
    max_length: int | None,
    weights: tuple[float, ...],
    tokenizer: TokenizerChoice | None,
    normalize: bool,
    precisions: tuple[str, ...],
    token_rewards: bool,
    golden: Path | None,
    calibrate: Path | None,
    certified: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Export a trained reward model to a bundle, and certify it against torch.

    CHECKPOINT is a local folder, or ORG/NAME or hf://ORG/NAME on the Hugging Face Hub, optionally with @REVISION, whose
    needed files are downloaded. No code that comes with it is run. The export fails, and leaves nothing behind, if a
    head is missing or left over, or if the bundle's rewards are not torch's. With --no-certify they are not compared,
    the torch model need not fit into memory, and the bundle is marked as uncertified.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"export needs {', '.join(missing)}: pip install 'rewardrt[export,cpu]'")
    if family is not None and spec_file is not None:
        raise click.UsageError("--family and --spec both say what the model is; give one")
    if golden is not None and not certified:
        raise click.UsageError("--golden names texts to certify on; leave it or --no-certify out")
    if tokens and family not in (None, "token-logit"):
        raise click.UsageError("--tokens says what is read, and so does --family; give one")
    sources = [name for name in (checkpoint, base) if name is not None]
    check_checkpoint(*(Path(name) for name in sources if find_repository(name) is None))
    if explain:
        if bundle is not None or spec_file is not None:
            raise click.UsageError(
                "--explain prints the spec that the checkpoint's files give; it goes with no BUNDLE or --spec"
            )
        from rewardrt_export.explain import explain as explain_source
        from rewardrt_export.source.folder import read_source
        from rewardrt_export.source.repository import find_checkpoint

        options = TokenOptions(tokens, function, template, close, instruction)
        folder, *below = (find_checkpoint(name, lambda step: toplevel.say(str(step))) for name in sources)
        source = read_source(folder, *below, pad_token=pad_token, chat_template=chat_template, tokenizer=tokenizer)
        click.echo(explain_source(source, family, options), nl=False)
        return
    if bundle is None:
        raise click.UsageError("give the folder to write the BUNDLE to (or --explain to write none)")
    check_target(bundle, force=force)
    from rewardrt.bundle.spec import to_json
    from rewardrt.cli.inspect import describe_manifest
    from rewardrt.cli.progress import Steps, duration

    with toplevel.sigterm_interrupts(), Steps() as steps:
        steps(Step("loading torch and transformers"))
        from rewardrt_export import pipeline

        written = pipeline.export(
            checkpoint,
            bundle,
            base=base,
            family=family,
            spec_file=spec_file,
            pooling=pooling,
            pad_token=pad_token,
            chat_template=chat_template,
            max_length=max_length,
            weights=weights,
            normalise=normalize,
            tokenizer=tokenizer,
            token_options=TokenOptions(tokens, function, template, close, instruction),
            precisions=precisions or ("fp32",),
            token_rewards=token_rewards,
            golden=golden,
            calibrate=calibrate,
            certified=certified,
            force=force,
            progress=steps,
        )
    manifest: Any = written.manifest
    if as_json:
        click.echo(json.dumps(to_json(manifest), indent=2, ensure_ascii=False))
    else:
        click.echo(describe_manifest(str(bundle), manifest))
    sys.stdout.flush()  # before what comes after it on a terminal
    named = shlex.quote(str(bundle))
    toplevel.say(
        f"exported in {duration(steps.seconds)}; next: `rewardrt score {named} ROWS.jsonl --table`, "
        f"or `rewardrt serve {named}`"
    )


@click.command(
    short_help="List the reward-model families.",
    epilog=example("rewardrt families", "rewardrt export CHECKPOINT bundle --family NAME"),
)
@click.option("--markdown", is_flag=True, help="Print docs/families.md.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def families(markdown: bool, as_json: bool) -> None:
    """List the reward-model families: the name of the head, where it reads, how texts end, what it outputs."""
    from rewardrt_export.families import FAMILIES
    from rewardrt_export.families.listing import as_markdown, as_rows, as_text

    if as_json:
        click.echo(json.dumps(as_rows(FAMILIES.values()), indent=2, ensure_ascii=False))
    elif markdown:
        click.echo(as_markdown(FAMILIES.values()))
    else:
        click.echo(as_text(FAMILIES.values(), min(width_of(sys.stdout), 110)))
        if sys.stdout.isatty():
            toplevel.say(
                "next: `rewardrt export CHECKPOINT BUNDLE`, with --family NAME where the files do not tell the family"
            )
