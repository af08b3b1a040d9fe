"""Language models whose reward is a function of a few tokens' logits after a text: rerankers, guards, judges."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rewardrt.bundle.spec import Combine, Output, TextRule
from rewardrt.errors import CheckpointError
from rewardrt_export.families.draft import Draft, Family
from rewardrt_export.families.language_model_head import token_head, token_id
from rewardrt_export.source.text_files import LOGIT_SCORE, read_json
from rewardrt_export.token_options import LOGIT_FUNCTIONS, LogitFunction, TokenOptions, encodable

if TYPE_CHECKING:
    from rewardrt_export.source.folder import Source

# Placeholders that users may write -> the spec's names.
NAMES = {"{query}": "{prompt}", "{document}": "{response}"}
_RANGE = re.compile(r"([0-9]{1,6})\.\.([0-9]{1,6})")
_ID = re.compile(r"[0-9]{2,9}")  # a single digit is a token's text, not an id
_WORDS = {
    "logit": (1, 1),
    "difference": (2, 2),
    "sigmoid": (1, 2),
    "softmax": (2, None),
    "log-odds": (2, None),
    "expectation": (2, None),
}


@dataclass(frozen=True)
class Recipe:
    """How one kind of model is read.

    Of two tokens, the reward is the probability of the first. The logits are divided by `temperature`. `values` are the
    values of the first and the last token of an expectation.
    """

    tokens: tuple[str | int, ...]
    function: LogitFunction
    text: TextRule
    temperature: float = 1.0
    values: tuple[float, float] | None = None
    max_length: int | None = None
    source: str = ""  # where the publisher documents it

    def draft(self, source: Source) -> Draft:
        """Return the draft of a checkpoint that is read by this recipe. Raises CheckpointError."""
        ids = tuple(each if isinstance(each, int) else token_id(source, each) for each in self.tokens)
        self._say_other_pieces(source, ids)
        least, most = _WORDS[self.function]
        if not least <= len(ids) <= (most or len(ids)):
            wanted = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} or {most}"
            raise CheckpointError(f"--function {self.function}: takes {wanted} tokens, found {len(ids)}")
        if len(set(ids)) < len(ids):
            raise CheckpointError(f"--tokens: {list(ids)} names one token twice")
        head = token_head(source, ids)
        if self.temperature != 1.0:
            # c tanh(s x / c) / t: dividing by t makes both the cap and the scale smaller by t.
            head = replace(head, scale=head.scale / self.temperature, softcap=head.softcap / self.temperature)
        if self.function == "expectation":
            if self.values is None:
                raise CheckpointError("--function expectation: the tokens have no values; name a range: --tokens 1..5")
            low, high = self.values
            head = replace(head, reduce="expectation", group=len(ids), low=low, high=high)
        two = self.function in ("difference", "sigmoid") and len(ids) == 2
        output = Output()
        if self.function == "sigmoid":
            output = Output("sigmoid")
        elif self.function in ("softmax", "log-odds"):
            output = Output("softmax" if self.function == "softmax" else "log_odds")
        named = ", ".join(f"{piece!r} (id {each})" for piece, each in zip(_pieces(source, ids), ids, strict=True))
        return Draft(
            heads=(head,),
            text=self.text,
            combine=Combine("difference") if two else Combine(),
            output=output,
            max_length=self.max_length,
            reasons={
                "heads": f"the logits of {named}: these rows of {head.layers[0].weight}",
                "text": self.source or "as the options say",
                "taps": "the last token of the whole text: what is predicted after it is read",
                "output": self.function,
            },
        )

    def _say_other_pieces(self, source: Source, ids: tuple[int, ...]) -> None:
        """Note if a word becomes another token after the end of the text than by itself, such as "▁yes" and "yes"."""
        end = (self.text.format.rpartition("}")[2] + self.text.close)[-20:]
        before = source.tokenizer.encode(end, add_special_tokens=False) if end else []
        for word, number in zip(self.tokens, ids, strict=True):
            after = source.tokenizer.encode(f"{end}{word}", add_special_tokens=False) if before else []
            if isinstance(word, str) and before and after[:-1] == before and after[-1] != number:
                own, other = _pieces(source, (number, after[-1]))
                source.choices["tokens"] = (
                    f"{word!r} is read as {own!r} (id {number}), which it is by itself; after the end of the text it "
                    f"is {other!r} (id {after[-1]}): if that is what the model says, name the ids"
                )
                return


def _pieces(source: Source, ids: tuple[int, ...]) -> list[str]:
    """Return the vocabulary's names of tokens, which show whether a token includes a space."""
    return [str(piece) for piece in source.tokenizer.convert_ids_to_tokens(list(ids))]


def describe_with(found: Recipe, source: Source, options: TokenOptions) -> Draft:
    """Return the draft of a checkpoint that is read by a recipe, changed by the options."""
    if options.tokens:
        tokens, values = parse_tokens(options.tokens)
        found = replace(found, tokens=tokens, values=values)
    if options.function:
        found = replace(found, function=options.function)
    text = found.text
    if options.template:
        text = format_rule(source, options.template, instruction=text.instruction)
    if options.close:
        text = _closed(source, text, options.close)
    if options.instruction:
        if not text.takes_instruction:
            raise CheckpointError(
                "--instruction: the text has no place for one; write {instruction} where it stands in --template"
            )
        text = replace(text, instruction=options.instruction)
    return replace(found, text=text).draft(source)


def _closed(source: Source, text: TextRule, close: str) -> TextRule:
    """Return the text rule with a text appended, in the way that fits the rule's source."""
    if text.source == "segments":
        return replace(text, segments=(*text.segments, close))
    if text.append_ids:
        more = source.tokenizer.encode(close, add_special_tokens=False)
        return replace(text, append_ids=(*text.append_ids, *more))
    return replace(text, close=close)


def parse_tokens(given: str) -> tuple[tuple[str | int, ...], tuple[float, float] | None]:
    """Return the tokens of --tokens, and for a range the values of its first and last token.

    `yes,no` are texts, `9693,2152` are ids, and `1..5` are digits with their values. A JSON list is for tokens with
    spaces or commas, and for numbers that are texts.
    """
    if not encodable(given):
        raise CheckpointError("--tokens: expected text that can be encoded as UTF-8, found a lone surrogate")
    if match := _RANGE.fullmatch(given.strip()):
        low, high = int(match[1]), int(match[2])
        if not low < high <= low + 100:
            raise CheckpointError(f"--tokens {given}: expected a range of 2 to 101 whole numbers, the lower first")
        return tuple(str(value) for value in range(low, high + 1)), (float(low), float(high))
    if given.lstrip().startswith("["):
        try:
            listed = json.loads(given)
        except (ValueError, RecursionError):
            listed = None
        good = isinstance(listed, list) and all(_is_token(each) for each in listed)
        if not isinstance(listed, list) or not listed or not good:
            raise CheckpointError(f"--tokens {given[:80]}: expected a JSON list of texts and ids")
        return tuple(listed), None
    parts = given.split(",")
    if spaced := next((part for part in parts if part != part.strip() or not part), None):
        raise CheckpointError(
            f"--tokens {given!r}: a token with a space is another token than the word alone; leave the space out of "
            f"{spaced!r}, or say that you mean it by a JSON list: --tokens '{json.dumps(parts, ensure_ascii=False)}'"
        )
    if "" in parts:
        raise CheckpointError(f"--tokens {given!r}: expected tokens between the commas")
    ids = [_ID.fullmatch(part) is not None for part in parts]
    if any(ids) and any(part.isdigit() for part, is_id in zip(parts, ids, strict=True) if not is_id):
        raise CheckpointError(
            f"--tokens {given[:80]}: a number of several digits is an id, and a digit a text; say which by a JSON "
            "list: --tokens '[1, 20]' are ids, '[\"1\", \"20\"]' texts"
        )
    return tuple(int(part) if is_id else part for part, is_id in zip(parts, ids, strict=True)), None


def _is_token(value: object) -> bool:
    """Whether a value in a JSON list is a text that UTF-8 can encode, or an id."""
    if type(value) is int:
        return 0 <= value < 10**9
    return isinstance(value, str) and bool(value) and encodable(value)


def format_rule(source: Source, template: str, *, instruction: str = "") -> TextRule:
    """Return the rule of a text with {instruction}, {prompt} or {query}, and {response} or {document}.

    The text is tokenized as a whole, after the BOS that the tokenizer adds. A text that is too long is cut in the
    response.
    """
    for name, ours in NAMES.items():
        template = template.replace(name, ours)
    for place, said in (("{prompt}", "{prompt} or {query}"), ("{response}", "{response} or {document}")):
        if template.count(place) != 1:
            found = "none" if place not in template else "several"
            raise CheckpointError(f"--template: expected one place {said} in the text, found {found}")
    return TextRule(
        "format", format=template, prepend_ids=begin_ids(source, template), cut="answer", instruction=instruction
    )


def chat_rule(source: Source, *, close: str = "", instruction_variable: str = "") -> TextRule:
    """Return the rule of a conversation in the checkpoint's chat template, up to the beginning of the model's turn."""
    if source.chat_template is None:
        raise CheckpointError(
            "the tokenizer has no chat template; say what the model reads: --template 'a text with {prompt} and "
            "{response}'"
        )
    return TextRule(
        "chat_template", generation_prompt=True, close=close, cut="answer", instruction_variable=instruction_variable
    )


def begin_ids(source: Source, template: str) -> tuple[int, ...]:
    """Return the BOS that the tokenizer adds, unless the text begins with its own."""
    bos = source.tokenizer.bos_token
    added = list(source.tokenizer("")["input_ids"])
    if bos is None or template.startswith(str(bos)) or added[:1] != [source.tokenizer.bos_token_id]:
        return ()
    return (added[0],)


def logit_score(source: Source) -> tuple[int | None, int | None]:
    """Return the ids in sentence-transformers' LogitScore module, of the true and the false token; None if absent."""
    path = source.folder / LOGIT_SCORE
    if not path.is_file():
        return None, None
    found = read_json(path)
    stated = (found.get("true_token_id"), found.get("false_token_id"))
    for each in stated:
        if each is not None and not (type(each) is int and 0 <= each < len(source.tokenizer)):
            raise CheckpointError(f"{path}: token id {each!r}; expected 0 to {len(source.tokenizer) - 1}, or null")
    return stated


def is_qwen3_reranker(source: Source) -> bool:
    """Whether the files say so: vLLM's override in config.json, or sentence-transformers' LogitScore of yes and no."""
    if source.raw.get("is_original_qwen3_reranker") is True:
        return True
    return source.config.model_type == "qwen3" and _texts_of_logit_score(source) == ("yes", "no")


def is_zerank_2(source: Source) -> bool:
    """Whether sentence-transformers' LogitScore reads only Yes, as in zerank-2."""
    return source.config.model_type == "qwen3" and _texts_of_logit_score(source) == ("Yes", None)


def _texts_of_logit_score(source: Source) -> tuple[str | None, str | None]:
    true, false = logit_score(source)
    return tuple(None if each is None else source.tokenizer.decode([each]) for each in (true, false))  # type: ignore[return-value]


def stated_tokens(source: Source) -> list[int]:
    """Return the ids of `classifier_from_token` in config.json, vLLM's field, with the false token first.

    The field lists one or two names in the vocabulary. Raises CheckpointError otherwise.
    """
    found = source.raw.get("classifier_from_token")
    if found is None:
        return []
    vocabulary = source.tokenizer.get_vocab()
    known = isinstance(found, list) and all(isinstance(each, str) and each in vocabulary for each in found)
    if not known or not 1 <= len(found) <= 2:
        raise CheckpointError(
            f"config.json: classifier_from_token {str(found)[:80]}; expected one or two names of the tokenizer's "
            "vocabulary"
        )
    return [vocabulary[each] for each in found]


def _stated(source: Source) -> tuple[int, ...]:
    """Return the ids that the checkpoint's files name, with the true token first."""
    return tuple(reversed(stated_tokens(source))) or tuple(each for each in logit_score(source) if each is not None)


def _describe_with(source: Source, options: TokenOptions) -> Draft:
    tokens, values = parse_tokens(options.tokens) if options.tokens else (_stated(source), None)
    if not tokens:
        raise CheckpointError("token-logit: say whose logits are the reward, as in --tokens yes,no")
    if options.function is None and values is None and len(tokens) > 2:
        raise CheckpointError(
            f"--tokens names {len(tokens)} tokens; say what is made of them: "
            f"--function {' or '.join(LOGIT_FUNCTIONS[3:])}"
        )
    usual: LogitFunction = "expectation" if values else "logit" if len(tokens) == 1 else "difference"
    text = format_rule(source, options.template) if options.template else chat_rule(source)
    recipe = Recipe(tokens, options.function or usual, text, values=values)
    return describe_with(recipe, source, replace(options, tokens="", function=None, template=""))


def logit_family(
    name: str,
    title: str,
    examples: tuple[str, ...],
    recipe: Callable[[Source], Recipe],
    matches: Callable[[Source], str | None] = lambda source: None,  # by default no file identifies the family
    *,
    head: str,
    eos: str,
    output: str,
    maths: str,
) -> Family:
    """Return a family whose checkpoints are all read by one recipe, at the last token."""

    def with_options(source: Source, options: TokenOptions) -> Draft:
        return describe_with(recipe(source), source, options)

    return Family(
        name=name,
        title=title,
        examples=examples,
        head=head,
        tap="last token of the whole text",
        eos=eos,
        output=output,
        maths=maths,
        matches=matches,
        describe=lambda source: with_options(source, TokenOptions()),
        with_options=with_options,
    )


def _matches(source: Source) -> str | None:
    if is_qwen3_reranker(source) or is_zerank_2(source) or not source.architecture.endswith("ForCausalLM"):
        return None
    if stated_tokens(source):
        return "config.json has classifier_from_token"
    return f"it has {LOGIT_SCORE}" if logit_score(source)[0] is not None else None


TOKEN_LOGIT = Family(
    name="token-logit",
    title="A function of a few tokens' logits",
    examples=("a judge of your own", "checkpoints with 1_LogitScore or classifier_from_token"),
    head="rows of the language model's head, named by --tokens; the class's logit scale and softcap are kept",
    tap="last token of the whole text",
    eos="none; the chat template with a generation prompt, or --template, then --close",
    output="by --function: logit, difference (default for two), sigmoid, softmax, log-odds, or expectation (1..5)",
    maths="x = softcap(W_lm[tokens] h[last]); r = x0 - x1, sigmoid(x0 - x1), softmax(x)[0], ln(p0 / (1 - p0)), x0 or "
    "sum(p_i v_i)",
    matches=_matches,
    describe=lambda source: _describe_with(source, TokenOptions()),
    with_options=_describe_with,
)
