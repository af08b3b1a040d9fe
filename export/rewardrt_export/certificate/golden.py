"""The texts that every bundle is certified on.

The default set was written for this project: short and long texts, several turns, Chinese and other scripts, code,
emoji, raw text, and one text that has to be cut. A user's own file replaces it.

Probes are added to either set. They are texts on which a bundle may be wrong although it agrees on ordinary ones: they
contain every special token literally, spaces at both ends and several Unicode forms, each field of a row that the chat
template reads, and more tokens than each window or original length that config.json names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from rewardrt.bundle.spec import Spec
from rewardrt.data.readers import read_rows_of
from rewardrt.errors import CertificateError, RowError
from rewardrt.scoring.pairwise import plan, text_of
from rewardrt.text.items import Conversation, Item, Pair, RawText, Steps, TokenIds
from rewardrt.text.rendering import Renderer
from rewardrt.text.rows import parse_row
from rewardrt.text.tokens import Tokenizer

MIN_TEXTS = 16  # with fewer, the standard deviation of the rewards, and so the tolerance, would be arbitrary
# If the model's limit is larger, the over-long text is certified under this one: only the cut matters.
OVERLONG_LIMIT = 512


# Constants of the probes:
MOST_SPECIAL = 32  # most texts with one special token each, if one text cannot contain all of them
MARGIN = 24  # tokens by which a probe exceeds a window or an original length
FORMS = (
    "  Spaces,\ttabs\n\n and lines; e\u0301 a\u030a \u1112\u1161\u11ab apart and é å 한 in one; "
    "ＡＢＣ　１２３, ﬁ, ½, ㌔; don't, they'll; 1,000 and 007; UPPER and snake_case; "
    "zero\u200bwidth, no\u00a0break; 👩‍💻  "
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "temperature",
            "description": "Tell the temperature at a place.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
INSTRUCTION = "Judge whether the answer is right, safe and of use."  # for models that read one and have no default
OTHER = {"role": "assistant", "content": "There is nothing to say."}  # the second answer of a probe, if two are read
DOCUMENTS = [{"title": "Oslo", "text": "It was four degrees at noon."}]


@dataclass(frozen=True)
class Candidate:
    """A text to certify on: a row with one text, and a limit in tokens below the spec's, or None.

    For models that read two answers together, two responses are one text.
    """

    row: dict[str, Any]
    max_length: int | None

    @property
    def item(self) -> Item:
        """The one text of the row."""
        return text_of(parse_row(self.row))


def golden_texts(renderer: Renderer, tokenizer: Tokenizer, spec: Spec, file: Path | None = None) -> list[Candidate]:
    """Return the texts of `file` (JSONL rows as `rewardrt score` takes them), or of the default set.

    Rows of the default set that cannot be scored are left out, for example because the model's template refuses a
    system turn, or a raw text lacks the tokens that a tap looks for. A row of the user's file that cannot be scored
    raises CertificateError. So does a set with fewer than MIN_TEXTS texts.
    """
    refused: list[RowError] = []
    scorable = (renderer, tokenizer, spec)
    texts = _read_file(file, *scorable) if file else _default_set(*scorable, refused)
    if len(texts) < MIN_TEXTS:
        why = f" ({len(refused)} cannot be scored: {refused[0]})" if refused else ""
        name = file or "the default golden set"
        raise CertificateError(f"{name}: {len(texts)} texts; expected at least {MIN_TEXTS}{why}")
    return texts


def _default_set(renderer: Renderer, tokenizer: Tokenizer, spec: Spec, refused: list[RowError]) -> list[Candidate]:
    lines = resources.files("rewardrt_export").joinpath("golden.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    limit = min(spec.max_length, OVERLONG_LIMIT)
    overlong = [_overlong(limit)]
    if renderer.rewards_steps:
        rows = [_split_into_steps(row) for row in rows if "text" not in row]
        rows += [{"text": text} for row in rows[:2] for text in _rendered(renderer, row)]
        # A text must not lose a step when it is cut, so the part that is cut follows the last step.
        question, words = (overlong[0][name] for name in ("prompt", "response"))
        short = {"prompt": question, "steps": ["Breathe in.", "Breathe out."]}
        overlong = [{"text": f"{text} {words}"} for text in _rendered(renderer, short)]
    texts = [Candidate(_instructed(row, spec), None) for row in rows]
    texts += [Candidate(_instructed(row, spec), limit) for row in overlong]
    if spec.reads_two_answers:
        texts = _pair_up(texts)
    elif spec.input == "pairwise":
        texts = [text for text in texts if not isinstance(text.item, RawText)]
    return [text for text in texts if _takes(renderer, tokenizer, text, refused)]


def probe_texts(
    renderer: Renderer,
    tokenizer: Tokenizer,
    spec: Spec,
    *,
    special_tokens: Sequence[str],
    named_tokens: Sequence[str],
    variables: Collection[str],
    lengths: Collection[int],
) -> list[Candidate]:
    """Return the probes that the model can score, the most revealing ones first.

    `special_tokens` are those that the tokenizer recognises in a text, and `named_tokens` those with a role (bos, eos,
    pad). `variables` are those that the chat template reads. `lengths` are in tokens; for each there is one longer
    text.
    """
    refused: list[RowError] = []

    def taken(rows: Iterable[dict[str, Any]], limit: int | None = None) -> list[Candidate]:
        rows = [_split_into_steps(row) if renderer.rewards_steps and "text" not in row else row for row in rows]
        texts = [Candidate(_instructed(row, spec), limit) for row in rows]
        if spec.reads_two_answers:
            answered = [item for text in texts if isinstance(item := text.item, Conversation)]
            both = [(item, Conversation(item.prompt, OTHER, item.inputs)) for item in answered]
            pairs = [Pair(*order) for item, other in both for order in ((item, other), (other, item))]
            texts = [Candidate(_row_of(pair), limit) for pair in pairs]
        elif spec.input == "pairwise":
            texts = [text for text in texts if not isinstance(text.item, RawText)]
        return [text for text in texts if _takes(renderer, tokenizer, text, refused)]

    apart, glued = " ".join(special_tokens), "x".join(special_tokens)
    probes = taken([_answered(f"They are {apart}, or in a row {glued}."), {"text": f"{apart} {glued}"}])
    if not probes:  # one of them is a marker that is not allowed in texts, or has no row in the embedding
        probes = taken(_answered(f"A text with {token} in it, and{token}without spaces.") for token in special_tokens)
    probes = probes[:MOST_SPECIAL]
    probes += taken([_answered(FORMS), {"text": FORMS}, {"text": f" {FORMS} "}])
    for length in sorted(lengths):
        probes += taken([_overlong(length + MARGIN)] if not renderer.rewards_steps else [], length + MARGIN)
    probes += taken(_answered(f"A text with {token} in it, and{token}without spaces.") for token in named_tokens)
    inputs: list[dict[str, Any]] = [{"tools": TOOLS}] if "tools" in variables else []
    inputs += [{"documents": DOCUMENTS}] if "documents" in variables else []
    others = sorted(set(variables) - {"messages", "tools", "documents", "add_generation_prompt", *spec.special_tokens})
    inputs += [{"chat_template_kwargs": dict.fromkeys(others, value)} for value in (False, True) if others]
    return probes + taken(_answered("It is four degrees in Oslo.") | fields for fields in inputs)


def _instructed(row: dict[str, Any], spec: Spec) -> dict[str, Any]:
    """Return the row with an instruction, if the model reads one and its bundle has no default."""
    needs = spec.text.takes_instruction and not spec.text.instruction and "text" not in row
    return row | {"instruction": INSTRUCTION} if needs else row


def _answered(response: str) -> dict[str, Any]:
    return {"prompt": "What is there to say?", "response": response}


def _overlong(tokens: int) -> dict[str, Any]:
    """Return a row that has more tokens than `tokens` in any tokenizer, because every word is at least one token."""
    words = " ".join(f"Step {number}: breathe in, count to {number % 7}, breathe out." for number in range(1, tokens))
    return {"prompt": "Describe a breathing exercise in too many steps.", "response": words}


def _pair_up(texts: list[Candidate]) -> list[Candidate]:
    """Pair each answer with the previous text's answer, in both orders."""
    answered = [(text, text.item) for text in texts]
    conversations = [(text, item) for text, item in answered if isinstance(item, Conversation)]
    pairs = []
    for (text, item), (_, other) in zip(conversations, conversations[-1:] + conversations[:-1], strict=True):
        beside = Conversation(item.prompt, other.answer, item.inputs)
        pairs += [Candidate(_row_of(Pair(*order)), text.max_length) for order in ((item, beside), (beside, item))]
    return pairs


def _takes(renderer: Renderer, tokenizer: Tokenizer, text: Candidate, refused: list[RowError]) -> bool:
    try:
        tokenizer.encode(renderer.render(text.item), max_length=text.max_length)
    except RowError as error:
        refused.append(error)
        return False
    return True


def _rendered(renderer: Renderer, row: dict[str, Any]) -> list[str]:
    """Return the text that the model reads for this row, in a list; [] if it refuses the row."""
    try:
        return [renderer.render(text_of(parse_row(row))).text]
    except RowError:
        return []


def _split_into_steps(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with one answer as a row whose steps are the answer's sentences and lines."""
    (item,) = parse_row(row).items
    assert isinstance(item, Conversation)
    parts = re.split(r"\n+|(?<=[.!?;。!?])\s*", str(item.answer["content"]))
    return _row_of(Steps(item.prompt, tuple(part.strip() for part in parts if part.strip()), inputs=item.inputs))


def _read_file(file: Path, renderer: Renderer, tokenizer: Tokenizer, spec: Spec) -> list[Candidate]:
    texts = []
    number = 0
    try:
        for line in read_rows_of(file):
            number = line.number
            if isinstance(line.row, RowError):
                raise line.row
            for item in plan(parse_row(line.row), spec).items:
                assert not isinstance(item, TokenIds)  # rows of files have no token ids
                tokenizer.encode(renderer.render(item))
                texts.append(Candidate(_row_of(item), None))
    except RowError as error:
        where = f"{file}, line {number}: " if number else ""
        raise CertificateError(f"{where}{error}") from error
    return texts


def _row_of(item: Item) -> dict[str, Any]:
    """Return one text as a row of its own, in the form of golden.jsonl."""
    if isinstance(item, RawText):
        return {"text": item.text}
    if isinstance(item, Pair):
        answers = [item.first.answer["content"], item.second.answer["content"]]
        prompt = item.first.prompt if isinstance(item.first.prompt, str) else list(item.first.prompt)
        return {"prompt": prompt, "responses": answers} | _inputs_of(item.first)
    inputs = _inputs_of(item)
    if isinstance(item, Steps):
        prompt = item.prompt if isinstance(item.prompt, str) else list(item.prompt)
        response = {} if item.response is None else {"response": item.response}
        return {"prompt": prompt, "steps": list(item.steps)} | response | inputs
    if isinstance(item.prompt, str) and isinstance(item.answer.get("content"), str) and len(item.answer) == 2:
        return {"prompt": item.prompt, "response": item.answer["content"]} | inputs
    return {"messages": list(item.messages)} | inputs


def _inputs_of(item: Conversation | Steps) -> dict[str, Any]:
    """Return the item's inputs to the chat template as fields of a row."""
    found = item.inputs
    fields = {"tools": found.tools, "documents": found.documents, "chat_template_kwargs": dict(found.options)}
    return {name: value for name, value in fields.items() if value}
