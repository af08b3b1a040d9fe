"""The description of a reward model as data: the part of the manifest in which families differ.

Nothing is computed here. `text` reads the text rule and the taps, and `scoring` the normalisation. The same frozen
dataclasses are written at export and read at load, by `to_json` and `from_json`.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from rewardrt.errors import BundleError

T = TypeVar("T")

# Metadata key of fields that were added later. Older manifests may lack them; new manifests always contain them.
OPTIONAL = "optional"

InputKind = Literal["single", "steps", "pairwise"]
TapRule = Literal[
    "last_mask",
    "last_not_id",
    "before_first_id",
    "last_id",
    "pattern_start",
    "all_ids",
    "first",
    "mean",
    "only_id",
    "prompt_end",
]
PoolingRule = Literal["last_mask", "last_not_id", "before_first_id"]  # the choices of --pooling
POOLING_RULES: tuple[PoolingRule, ...] = typing.get_args(PoolingRule)
Activation = Literal["none", "relu", "leaky_relu", "gelu", "gelu_tanh", "tanh", "sigmoid", "selu", "silu"]
ReduceRule = Literal["none", "mean", "expectation"]
CombineRule = Literal["none", "dot", "gate", "difference", "skew"]
OutputFunction = Literal["identity", "sigmoid", "softmax", "log_odds", "negate"]
StepLayout = Literal["joined", "turns", "apart"]
AggregateRule = Literal["min", "product", "last", "mean"]  # how --aggregate combines the steps' rewards
AGGREGATE_RULES: tuple[AggregateRule, ...] = typing.get_args(AggregateRule)


@dataclass(frozen=True)
class TextRule:
    """How a conversation becomes the token ids that the model was trained on.

    The steps run in the order of the fields. They do not apply to a row with `text`, which is tokenized exactly as
    sent. One exception: if `source` is pair, such a text gets the special tokens of a single text, because the encoder
    never saw a text without them.

    For the input "steps" (process reward models), `step_layout` says how prompt, steps and `step_token` are joined:

    joined   the response is all steps one after another, with `step_token` after each
    turns    every step is a user turn, and `step_token` the assistant's reply to it; the first step is appended to the
             prompt's last turn after a space
    apart    the text before the response, every step and every `step_token` are tokenized separately
    """

    # concatenate: prompt + response; format: `format` with {prompt}, {response} and {instruction} filled in; pair:
    # tokenizer(prompt, response); segments: several texts, each tokenized alone, then joined. With chat_template and a
    # `format`, the filled-in format is the template's only message, from the user. In models that read two answers in
    # one text, the answers are {first} and {second}.
    source: Literal["chat_template", "concatenate", "format", "pair", "segments"] = "chat_template"
    format: str = ""
    segments: tuple[str, ...] = ()  # formats of the segments; a segment without a {placeholder} is never cut
    # The fixed segments leave a part of max_length to those with placeholders. `first_part` is the share of it that the
    # first of them may take; the others share the rest evenly.
    first_part: float = 0.0
    prompt_template: str = (
        ""  # Jinja that makes {prompt} of the prompt's messages; without it a prompt is one user turn
    )
    remove: str = ""  # removed from the text wherever it occurs (such as a BOS that the template writes)
    strip_tail: str = ""  # these characters are stripped from the end of the text
    append_if_missing: str = ""  # the closing EOS as text, appended unless the text ends with it
    append_prefix: str = ""  # inserted between the text and that EOS
    add_special_tokens: bool = False  # whether the tokenizer's own post-processor adds BOS and the like
    append_ids: tuple[int, ...] = ()  # appended after the text is cut to make room for them
    overwrite_last: int | None = None  # after the cut, the last id is replaced by this one
    step_token: str = ""  # input "steps": the text after every step
    type_ids: bool = False  # whether the model takes token_type_ids: 0 for the first text's tokens, 1 for the second's
    step_layout: StepLayout = "joined"
    prepend_ids: tuple[int, ...] = ()  # put before the ids of the text (a BOS that the tokenizer does not add)
    # Whether a special token that occurs literally in a text is tokenized as ordinary text. tokenizer.json has no such
    # setting.
    split_special_tokens: bool = field(default=False, metadata={OPTIONAL: True})
    instruction: str = field(default="", metadata={OPTIONAL: True})  # the instruction of rows that have none
    # If set, a row's instruction is put into this format before it replaces {instruction}; without an instruction,
    # {instruction} is replaced by nothing.
    instruction_format: str = field(default="", metadata={OPTIONAL: True})
    # The chat template's variable that receives the instruction, if no format contains {instruction}.
    instruction_variable: str = field(default="", metadata={OPTIONAL: True})
    generation_prompt: bool = field(default=False, metadata={OPTIONAL: True})  # the template begins the model's turn
    close: str = field(default="", metadata={OPTIONAL: True})  # appended to the text, whatever it ends with
    # Whether white space around prompt and response is stripped before they are put into a format.
    strip_words: bool = field(default=False, metadata={OPTIONAL: True})
    # Where a text that is too long is cut: at its end, or in the answer, so that the text after the answer is kept.
    cut: Literal["end", "answer"] = field(default="end", metadata={OPTIONAL: True})

    @property
    def takes_instruction(self) -> bool:
        """Whether the model reads an instruction in addition to prompt and response."""
        formats = (self.format, *self.segments)
        return bool(self.instruction_variable) or any("{instruction}" in format for format in formats)


@dataclass(frozen=True)
class Tap:
    """The position at which a hidden state is read, among the token ids of one text without padding.

    last_mask         the last token
    last_not_id       the rightmost token that is not `ids[0]`; token 0 if there is none
    before_first_id   the token before the first `ids[0]`, not counting the first `skip` of them; the last token if
                      there is none, or if it is token 0
    last_id           the rightmost `ids[0]`; a text without it cannot be scored
    pattern_start     the first token of the rightmost occurrence of `ids`; a text without one cannot be scored
    all_ids           the first token of every occurrence of `ids`, with one reward each (process rewards)
    only_id           the only `ids[0]` of the text; a text with none or several cannot be scored
    prompt_end        the last token of the first message, rendered and tokenized alone
    first             token 0 (CLS)
    mean              the mean over the last `count` tokens, or over all of them if `count` is 0

    `offset` is added to the position that the rule finds.
    """

    name: str = "last"
    rule: TapRule = "last_mask"
    ids: tuple[int, ...] = ()
    count: int = 0
    offset: int = 0
    skip: int = 0

    def __post_init__(self) -> None:
        needs_ids = self.rule in ("last_not_id", "before_first_id", "last_id", "pattern_start", "all_ids", "only_id")
        if needs_ids != bool(self.ids):
            expected = "some" if needs_ids else "none"
            raise BundleError(f"tap {self.name!r}: rule {self.rule} with ids {list(self.ids)}; expected {expected}")


@dataclass(frozen=True)
class Layer:
    """One linear layer of a head, its activation, then a layer normalisation if `norm` names its weight.

    The names are those of the checkpoint's tensors; weight is [out, in].
    """

    weight: str
    bias: str | None = None
    activation: Activation = "none"
    rows: tuple[int, ...] = ()  # only these rows of weight and bias, as of a language model's head; () for all
    batch_norm: str | None = None  # name prefix of the tensors of a batch norm (evaluation mode) after the activation
    norm: str | None = None
    norm_bias: str | None = None
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class Head:
    """A stack of linear layers over the hidden states of its taps, concatenated if there are several.

    The outputs x are multiplied by `scale`; then a `softcap` c > 0 replaces each by c * tanh(x / c), as language models
    do with their logits. `reduce` makes one value from every `group` neighbouring outputs: their mean (quantiles), or
    the expectation of a softmax over values evenly spaced from `low` to `high` (a distribution over scores).
    """

    layers: tuple[Layer, ...]
    taps: tuple[str, ...] = ("last",)
    reduce: ReduceRule = "none"
    group: int = 1
    low: float = 0.0
    high: float = 1.0
    minus: tuple[float, ...] = ()  # subtracted from the values: one mean for each value
    scale: float = field(default=1.0, metadata={OPTIONAL: True})
    softcap: float = field(default=0.0, metadata={OPTIONAL: True})  # 0: none


@dataclass(frozen=True)
class Combine:
    """How the outputs of the heads become the reward.

    none         the one value of the one head
    dot          sum(values * weights), for one head
    gate         sum(g * scale * (values @ matrix)), for two heads: values and gate. g is softmax(gate / temperature),
                 or the gate itself without `softmax`
    difference   mean(first - second), for two heads; for one head with two outputs, the first minus the second
    skew         the values themselves, a vector u: two texts are compared by sum(u[2k] * v[2k+1] - u[2k+1] * v[2k]).
                 A second head, with half as many outputs, weights the terms by softmax(gate / temperature) * scale
    """

    rule: CombineRule = "none"
    weights: tuple[float, ...] = ()
    softmax: bool = True
    temperature: float = 1.0
    scale: float = 1.0
    matrix: str | None = None  # name of a tensor on disk, [values, values]; identity if None
    scale_tensor: str | None = None  # name of a tensor on disk that holds `scale`
    unit: bool = False  # skew: the vector is first divided by its Euclidean norm


@dataclass(frozen=True)
class Output:
    """The function applied to the combined value, and the names of the objectives.

    softmax takes component `index` of the softmax p over the outputs; log_odds takes ln(p / (1 - p)) of that component;
    negate changes the sign. `labels` name the columns of the graph's `rewards` after the reward itself: the objectives.
    """

    function: OutputFunction = "identity"
    index: int = 0
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.labels)) < len(self.labels):
            raise BundleError(f"labels {list(self.labels)}: expected names that all differ")


@dataclass(frozen=True)
class Affine:
    """Normalisation `(reward - mean) / (std + eps)`: eps is 0 in OpenRLHF's RewardModel.forward, 1e-8 in safe-rlhf."""

    mean: float
    std: float
    eps: float = 0.0


@dataclass(frozen=True)
class Spec:
    """Everything in which one kind of reward model differs from another.

    Export builds the graph from it, and the runtime the token ids and positions. A --spec file is a Spec in TOML.
    """

    family: str
    backbone: str  # transformers' model_type
    causal: bool
    heads: tuple[Head, ...]
    max_length: int  # in tokens; longer texts are cut on the right
    special_tokens: dict[str, str]  # variables of the chat template: bos_token, eos_token, ...
    input: InputKind = "single"
    text: TextRule = TextRule()
    taps: tuple[Tap, ...] = (Tap(),)
    combine: Combine = Combine()
    output: Output = Output()
    normalise: Affine | None = None
    normalise_by_default: bool = False
    # Rows of the embedding; all token ids are smaller. None in bundles of format version 1, which do not record it.
    vocabulary: int | None = field(default=None, metadata={OPTIONAL: True})
    # Whether right padding leaves a text's reward unchanged; not in models that mix each token with its neighbours.
    padded: bool = field(default=True, metadata={OPTIONAL: True})

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise BundleError(f"max_length {self.max_length}: expected at least 1")
        if self.normalise_by_default and self.normalise is None:
            raise BundleError("normalise_by_default is set, but the spec has no mean and std")
        names = [tap.name for tap in self.taps]
        if not names or len(set(names)) < len(names):
            raise BundleError(f"taps {names}: expected at least one, each with a name of its own")
        if not self.heads:
            raise BundleError("heads: expected at least one")
        for head in self.heads:
            if not head.layers or not head.taps or not set(head.taps) <= set(names):
                raise BundleError(f"a head reads {list(head.taps)}; expected layers over some of the taps {names}")
        self._check_input()

    def _check_input(self) -> None:
        """Check that text rule, taps and combine rule fit the kind of input."""
        if self.text.type_ids and (self.causal or self.text.source != "pair"):
            raise BundleError("text.type_ids is set; expected an encoder that reads a pair of texts")
        if (self.input == "steps") != (self.taps[0].rule == "all_ids"):
            raise BundleError(
                f"input {self.input!r} with tap rule {self.taps[0].rule}: the input 'steps' needs the rule all_ids, "
                "other inputs may not have it"
            )
        if (self.input == "steps") != bool(self.text.step_token):
            raise BundleError(
                f"input {self.input!r} with step_token {self.text.step_token!r}: the input 'steps' needs one, other "
                "inputs may not have one"
            )
        if self.input == "steps" and (len(self.taps) > 1 or self.output.labels):
            raise BundleError("input 'steps': expected one tap and no labels, each step has one reward")
        if self.text.step_layout == "turns" and self.text.source != "chat_template":
            raise BundleError("step_layout 'turns' needs the source chat_template")
        ends_with_response = self.text.source == "format" and self.text.format.endswith("{response}")
        if self.text.step_layout == "apart" and self.text.source != "concatenate" and not ends_with_response:
            raise BundleError("step_layout 'apart' needs the source concatenate, or a format that ends with {response}")
        if self.combine.rule == "skew" and self.input != "pairwise":
            raise BundleError(f"input {self.input!r} with combine rule skew: only pairwise models compare vectors")
        formats = "".join((self.text.format, *self.text.segments))
        if self.reads_two_answers != ("{first}" in formats and "{second}" in formats):
            raise BundleError(
                f"input {self.input!r}, combine rule {self.combine.rule}, format {formats!r}: a pairwise model that "
                "reads two answers in one text needs {first} and {second}, other models may not have them"
            )

    @property
    def reads_two_answers(self) -> bool:
        """Whether one text contains two answers; its reward then says how much better the first answer is."""
        return self.input == "pairwise" and self.combine.rule != "skew"

    @property
    def reads_prompt_end(self) -> bool:
        """Whether a tap needs to know where the first message ends."""
        return any(tap.rule == "prompt_end" for tap in self.taps)

    @property
    def has_positions(self) -> bool:
        """Whether the graph has the input `positions`, the positions of the taps.

        A causal model with one tap has not: its text is simply cut at the tap. Means and first tokens need no
        positions.
        """
        if self.input == "steps":
            return False
        fixed = all(tap.rule in ("first", "mean") for tap in self.taps)
        return not fixed and not (self.causal and len(self.taps) == 1)


def to_json(value: Any) -> Any:
    """Turn a dataclass of this package into dictionaries and lists that `json.dumps` accepts."""
    return dataclasses.asdict(value)


def from_json(cls: type[T], data: Any, where: str = "", *, complete: bool = True) -> T:
    """Build the dataclass `cls` from parsed JSON or TOML, strictly.

    Raises BundleError naming the place of a missing field, an unknown field, or a value of the wrong type. With
    `complete=False`, as for files written by people, a field that has a default may be missing.
    """
    return typing.cast(T, _decode(cls, data, where or cls.__name__, complete))


def _decode(kind: Any, data: Any, where: str, complete: bool) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_dataclass(kind, data, where, complete)
    if origin is Literal:
        if data in arguments:
            return data
        raise BundleError(f"{where}: {data!r} is not one of {', '.join(map(repr, arguments))}")
    if origin in (typing.Union, types.UnionType):
        options = [argument for argument in arguments if argument is not type(None)]
        return None if data is None and len(options) < len(arguments) else _decode(options[0], data, where, complete)
    if origin is tuple and isinstance(data, list):
        return tuple(_decode(arguments[0], item, f"{where}[{index}]", complete) for index, item in enumerate(data))
    if origin is dict and isinstance(data, dict):
        return {key: _decode(arguments[1], item, f"{where}[{key!r}]", complete) for key, item in data.items()}
    if kind is float and type(data) in (int, float):
        return float(data)
    if kind is Any:
        return data
    if type(data) is int and kind is int and abs(data) >= 2**63:
        raise BundleError(f"{where}: expected a whole number of 64 bits, found one of {data.bit_length()}")
    if type(data) is kind:  # exact: a JSON true is not the number 1
        return data
    raise BundleError(f"{where}: expected {getattr(kind, '__name__', kind)}, found {type(data).__name__}")


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _decode_dataclass(cls: type, data: Any, where: str, complete: bool) -> Any:
    if not isinstance(data, dict):
        raise BundleError(f"{where}: expected an object, found {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    needed = [
        field.name for field in fields if (complete and not field.metadata.get(OPTIONAL)) or _has_no_default(field)
    ]
    unknown = sorted(data.keys() - {field.name for field in fields})
    missing = [name for name in needed if name not in data]
    if unknown or missing:
        found = [f"unknown field {name!r}" for name in unknown] + [f"no field {name!r}" for name in missing]
        remedy = "; the bundle is damaged or from another version: export it again" if complete else ""
        raise BundleError(f"{where}: {', '.join(found)}{remedy}")
    try:
        return cls(**{name: _decode(hints[name], value, f"{where}.{name}", complete) for name, value in data.items()})
    except BundleError as error:
        if str(error).startswith(where):
            raise
        raise BundleError(f"{where}: {error}") from None
