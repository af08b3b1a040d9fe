"""A checkpoint folder as it stands: config.json, tensors by name, tokenizer. Nothing here knows families.

What needs more than one folder, or comes in a layout that transformers has no class for, is made uniform here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    LlamaTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from rewardrt.errors import CheckpointError
from rewardrt_export.source.adapters import Adapter, find_adapter, merge_adapter
from rewardrt_export.source.chat_template import TOKENIZER_CONFIG, read_chat_template
from rewardrt_export.source.layouts import LAYOUTS, Layout
from rewardrt_export.source.padding import Padding, read_padding
from rewardrt_export.source.tokenizer import TokenizerChoice, TrainedTokenizer, settle
from rewardrt_export.source.tokenizer_files import (
    SETTINGS,
    check_tokenizer_files,
    check_vocabulary,
    differs_from_sentencepiece,
    find_tokenizer_files,
    read_limit,
)
from rewardrt_export.source.weights import (
    StoredTensor,
    check_weights,
    first_line,
    read_file,
    read_json,
    read_tensors,
    shorten,
)

CONFIG_FILE = "config.json"
VOCABULARY_TENSORS = ("embed_tokens.weight", "embed_in.weight", "wte.weight", "word_embeddings.weight")

MAY_BE_ABSENT = ("quantization_config", "vision_config", "audio_config", "text_config", "auto_map")
# Numbers of which transformers makes lists while it reads config.json, and what is out of all proportion for each.
COUNTED = {"num_labels": 1_000_000} | dict.fromkeys(
    ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 100_000
)
# Where LLaMA-Factory and TRL put a value head beside a model; TRL's name beside an adapter is the whole model's.
VALUE_HEAD_FILES = ("value_head.safetensors", "value_head.bin", "v_head.bin")
FILES_BESIDE_ADAPTERS = (*VALUE_HEAD_FILES, "model.safetensors", "pytorch_model.bin")
# The class that PEFT's task types are trained in, by model_type; the base's config.json names another.
TASK_CLASSES: dict[str, dict[str, str]] = {
    "SEQ_CLS": dict(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    "TOKEN_CLS": dict(MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
}
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining")
_LANGUAGE_MODEL_HEAD = re.compile(r"(pretrained_model\.)?(lm_head|embed_out)\.(weight|bias)")


@dataclass(frozen=True)
class Source:
    """What a family is told from, and makes its spec of.

    An adapter looks like the whole model that it was trained as: its base's config and the merged tensors. `unused` are
    tensors that the reward does not use, and why that is right.
    """

    folder: Path
    raw: dict[str, Any]  # config.json as it stands
    config: PretrainedConfig
    stored: dict[str, StoredTensor]
    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None
    padding: Padding
    adapter: Adapter | None = None
    unused: dict[str, str] = field(default_factory=dict)
    # Where the files allow two readings: the one that was taken, by what was chosen. Export prints each as a line, and
    # the manifest keeps them.
    choices: dict[str, str] = field(default_factory=dict)
    trained: TrainedTokenizer | None = None  # `tokenizer`, and how it was settled on

    @property
    def architecture(self) -> str:
        """The first of config.json's `architectures`, or what to call a config without."""
        found = self.raw.get("architectures")
        return str(found[0]) if isinstance(found, list) and found else "a model without architectures"

    @property
    def says_base_model(self) -> bool:
        """Whether config.json names no class with a head of a reward's: the base model's, a language model's, or none.

        It is then the base's own file, which trainers leave beside the weights, and says nothing of the head.
        """
        found = self.raw.get("architectures")
        if not (isinstance(found, list) and found):
            return True
        bare = type(self.config).__name__.replace("Config", "Model")
        return self.architecture == bare or self.architecture.endswith(LANGUAGE_MODELS)

    @property
    def width(self) -> int:
        """The size of the backbone's last hidden state (small OPT models project it down at the end)."""
        width: int = getattr(self.config, "word_embed_proj_dim", None) or self.config.hidden_size
        return width

    @property
    def pad_id(self) -> int | None:
        """The id that training padded with, None where transformers reads the last token; noted in `choices`.

        Raises CheckpointError where the files allow two.
        """
        return self.choose_pad_id()

    def choose_pad_id(self, *, required: bool = False) -> int | None:
        """Return `pad_id`; with `required`, the tokenizer's where there is none."""
        found, choice = self.padding.choose(required=required)
        if choice is not None:
            self.choices["pad_token"] = choice
        return found

    def token_id(self, token: str) -> int:
        """Return the id of a token that the tokenizer must have, or raise CheckpointError."""
        found = self.tokenizer.convert_tokens_to_ids(token)
        if not isinstance(found, int) or found == self.tokenizer.unk_token_id:
            raise CheckpointError(f"{self.folder}: the tokenizer has no token {token!r}, which this family reads")
        return found


def read_source(
    folder: Path,
    base: Path | None = None,
    *,
    pad_token: str | None = None,
    chat_template: str | None = None,
    tokenizer: TokenizerChoice | None = None,
) -> Source:
    """Read a checkpoint folder, or an adapter's folder and its base's.

    What the folder leaves out, config.json or the tokenizer, is read from the folder `base`. `pad_token` is the token,
    or its id, that training padded with; `chat_template` one of several by its name, or a file; `tokenizer` says which
    of two readings of the tokenizer is taken where they differ. Raises CheckpointError naming the file that is missing
    or damaged.
    """
    for place in (folder, base):
        if place is not None and not place.is_dir():
            found = "a file" if place.exists() else "nothing"
            raise CheckpointError(f"{place}: expected a checkpoint folder, found {found}")
    adapter = find_adapter(folder, base)
    if adapter is not None:
        return _read_adapter_source(adapter, pad_token, chat_template, tokenizer)
    check_weights(folder)
    described = folder if base is None or (folder / CONFIG_FILE).is_file() else base
    raw = read_json(described / CONFIG_FILE)
    config = _read_config(described, raw)
    stored = _read_whole(folder)
    _check_size(config, stored)
    if (layout := _layout(raw)) is not None:
        stored = layout.tensors(stored, raw)
    if described != folder:
        _fit_vocabulary(config, stored)
    tokenized = folder if base is None or find_tokenizer_files(folder) else base
    if base is not None and described == tokenized == folder:
        raise CheckpointError(f"--base {base}: {folder} is no adapter and leaves nothing out; export it without --base")
    template, choices = _read_template(tokenized, chat_template)
    trained = _read_tokenizer(tokenized, config if tokenized == described and layout is None else None, tokenizer)
    padding = read_padding(trained.tokenizer, config, borrowed=False, given=pad_token)
    choices |= _tokenizer_choice(trained)
    return Source(folder, raw, config, stored, trained.tokenizer, template, padding, choices=choices, trained=trained)


def _tokenizer_choice(trained: TrainedTokenizer) -> dict[str, str]:
    return {"tokenizer": trained.choice} if trained.choice else {}


def language_model_head(stored: dict[str, StoredTensor]) -> dict[str, str]:
    """Return the tensors of a causal language model's own head, and why a reward may leave them out."""
    reason = "the language model's head: the reward is read off the hidden state"
    return {name: reason for name in stored if _LANGUAGE_MODEL_HEAD.fullmatch(name)}


def _read_whole(folder: Path) -> dict[str, StoredTensor]:
    """Read the tensors of a whole model, and of a value head that was saved beside it."""
    stored, beside = read_tensors(folder), _read_head_file(folder, VALUE_HEAD_FILES)
    twice = sorted(stored.keys() & beside.keys())
    if twice:
        raise CheckpointError(
            f"{folder}: {shorten(twice)} both in the model's file and in a value head's; remove the one that is stale"
        )
    return stored | beside


def _read_head_file(folder: Path, names: tuple[str, ...]) -> dict[str, StoredTensor]:
    """Read the first of these files that is there; old ones call the head's layer `summary` alone."""
    for name in names:
        if (folder / name).is_file():
            found = {
                key if not key.startswith("summary.") else f"v_head.{key}": tensor
                for key, tensor in read_file(folder / name).items()
            }
            return {key: dataclasses.replace(tensor, name=key) for key, tensor in found.items()}
    return {}


def _read_adapter_source(
    adapter: Adapter, pad_token: str | None, chat_template: str | None, choice: TokenizerChoice | None
) -> Source:
    """Read an adapter as the model that was trained: the base's files, and the adapter's own where it has some."""
    folder, base = adapter.folder, adapter.base
    described = folder if (folder / "config.json").is_file() else base
    raw = read_json(described / "config.json")
    below = read_json(base / "config.json").get("model_type")
    if raw.get("model_type") != below:
        raise CheckpointError(f"{folder}: an adapter of a {raw.get('model_type')} model, and {base} is a {below} model")
    config = _read_config(described, raw)
    plain = _read_whole(base)
    _check_size(config, plain)
    beside = _read_head_file(folder, FILES_BESIDE_ADAPTERS)
    strays = sorted(name for name in beside if not name.startswith("v_head."))
    if strays:
        raise CheckpointError(
            f"{folder}: an adapter, and other weights beside it ({shorten(strays, 3)}); remove adapter_config.json if "
            "they are the merged model, or the weights if they are not"
        )
    stored = merge_adapter(adapter, plain) | beside
    classes = TASK_CLASSES.get(adapter.task or "", {})
    if config.model_type in classes:
        raw = raw | {"architectures": [classes[config.model_type]]}
    tokenized = folder if find_tokenizer_files(folder) else base
    template, choices = _read_template(tokenized, chat_template)
    trained = _read_tokenizer(tokenized, config if tokenized == described else None, choice)
    padding = read_padding(trained.tokenizer, config, borrowed=described != folder, given=pad_token)
    _follow_vocabulary(config, plain, stored)
    unused = language_model_head(stored)
    choices |= _tokenizer_choice(trained)
    tokenizer = trained.tokenizer
    return Source(folder, raw, config, stored, tokenizer, template, padding, adapter, unused, choices, trained)


def _follow_vocabulary(
    config: PretrainedConfig, before: dict[str, StoredTensor], after: dict[str, StoredTensor]
) -> None:
    """Set the config's vocabulary to that of the adapter, which holds the embeddings if tokens were added."""
    for name in before.keys() & after.keys():
        old, new = before[name].shape, after[name].shape
        if old != new and old[0] == config.vocab_size and old[1:] == new[1:]:
            config.vocab_size = new[0]


def _fit_vocabulary(config: PretrainedConfig, stored: dict[str, StoredTensor]) -> None:
    """Take the vocabulary's size from the tensors: trainers round it up, and the base model's config does not know."""
    sizes = {tensor.shape[0] for name, tensor in stored.items() if name.endswith(VOCABULARY_TENSORS)}
    if len(sizes) == 1:
        config.vocab_size = sizes.pop()


def _read_config(folder: Path, raw: dict[str, Any]) -> PretrainedConfig:
    where, kind = folder / CONFIG_FILE, raw.get("model_type")
    if _is_quantized(raw.get("quantization_config")):
        raise CheckpointError(f"{where}: a quantized checkpoint; export the one it was made from")
    if (layout := _layout(raw)) is not None:
        return _read_layout(folder, raw, layout)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        remote = " (it comes with code of its own, which is never run)" if "auto_map" in raw else ""
        raise CheckpointError(f"{where}: model_type {kind!r} is not an architecture that transformers knows{remote}")
    for name, most in COUNTED.items():
        if isinstance(count := raw.get(name), int) and count > most:
            raise CheckpointError(
                f"{where}: {name} {count}; no model has so many, and transformers makes a list of them"
            )
    try:
        if repr(mended := _mend(kind, raw)) != repr(raw):  # 0 == 0.0
            config = CONFIG_MAPPING[kind].from_dict(mended)
        else:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        several = bool(config.is_encoder_decoder) or getattr(config, "vision_config", None) is not None
    except Exception as error:  # transformers raises KeyError, ValueError, OSError and its own kinds here
        field = _blamed_field(kind, raw)
        raise CheckpointError(f"{where}: not a config of model_type {kind!r}{field} ({first_line(error)})") from error
    if several:
        raise CheckpointError(f"{config.model_type}: encoder-decoder and vision models cannot be exported")
    assert isinstance(config, PretrainedConfig)
    return config


def _mend(kind: str, raw: dict[str, Any]) -> dict[str, Any]:
    """Write what transformers' classes are too strict about as they want it; the meaning is the same.

    A whole number where they expect a float (`"initializer_range": 0`), and null where a field may only be absent.
    """
    found = {name: value for name, value in raw.items() if value is not None or name not in MAY_BE_ABSENT}
    types = {field.name: field.type for field in dataclasses.fields(CONFIG_MAPPING[kind])}
    floats = {name for name, kind in types.items() if kind is float or kind in (float | None, "float", "float | None")}
    return found | {name: float(found[name]) for name in floats & found.keys() if type(found[name]) is int}


def _blamed_field(kind: str, raw: dict[str, Any]) -> str:
    """Name the field without which transformers takes the config: what it raises often does not."""
    for name in raw:
        try:
            CONFIG_MAPPING[kind].from_dict({key: value for key, value in raw.items() if key != name})
        except Exception:  # then it is not this one alone
            continue
        return f": {name} {str(raw[name])[:80]!r}"
    return ""


def _is_quantized(stated: Any) -> bool:
    """Whether config.json's quantization_config says that weights are quantized: null, {} and false do not."""
    if not isinstance(stated, dict):
        return bool(stated)
    if stated.get("quant_method") in (None, "none", "bitsandbytes"):  # the last says by two switches what it does
        return any(stated.get(name) for name in ("load_in_4bit", "load_in_8bit", "bits"))
    return True


def _check_size(config: PretrainedConfig, stored: dict[str, StoredTensor]) -> None:
    """Check that the config's layers can be among the tensors, before any are built: each takes time and memory."""
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(stored):
        raise CheckpointError(
            f"config.json: num_hidden_layers {layers}, and the checkpoint has {len(stored)} tensors: not one for each "
            "layer; config.json is of another model"
        )


def _layout(raw: dict[str, Any]) -> Layout | None:
    return LAYOUTS.get(str(raw.get("model_type")))


def _read_layout(folder: Path, raw: dict[str, Any], layout: Layout) -> PretrainedConfig:
    try:
        return layout.config(raw)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: not a config of model_type {raw['model_type']} ({error})"
        ) from error


def _read_tokenizer(folder: Path, config: PretrainedConfig | None, choice: TokenizerChoice | None) -> TrainedTokenizer:
    """Read the tokenizer of a folder, whose config transformers is given where it was read already."""
    own_code = (folder / TOKENIZER_CONFIG).is_file() and "auto_map" in read_json(folder / TOKENIZER_CONFIG)
    if own_code and not (folder / "tokenizer.json").is_file():
        # transformers would guess at a class for the other files, and so at the ids.
        raise CheckpointError(
            f"{folder}: no tokenizer.json, and a tokenizer with code of its own, which is never run; make one with "
            "AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(folder)"
        )
    check_tokenizer_files(folder)
    for name in ("tokenization_utils_base", "configuration_utils"):
        logging.getLogger(f"transformers.{name}").setLevel(logging.ERROR)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False
        )
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # transformers', tokenizers' and sentencepiece's, and a panic is no Exception
        found = find_tokenizer_files(folder)
        read = ", ".join([*found, *(name for name in SETTINGS if (folder / name).is_file())])
        why = (
            "" if "tokenizer.json" in found else "; its class reads other files, or one is missing: add tokenizer.json"
        )
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be loaded from {read}{why} ({first_line(error)})"
        ) from error
    check_vocabulary(folder, tokenizer)
    if differs_from_sentencepiece(folder, tokenizer) is not None:
        tokenizer = _read_sentencepiece(folder, tokenizer)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise CheckpointError(f"{folder}: {type(tokenizer).__name__} has no fast version, which the runtime needs")
    tokenizer.model_max_length = read_limit(folder / TOKENIZER_CONFIG, tokenizer.model_max_length)
    return settle(tokenizer, folder, choice)


def _read_sentencepiece(folder: Path, tokenizer: Any) -> PreTrainedTokenizerBase:
    """Read tokenizer.model as Llama's class does, where no file names a class and the one that was taken errs."""
    said = differs_from_sentencepiece(folder, tokenizer)
    with contextlib.suppress(Exception):  # it has another layout then
        found: PreTrainedTokenizerBase = LlamaTokenizer.from_pretrained(folder, local_files_only=True)
        if differs_from_sentencepiece(folder, found) is None:
            return found
    raise CheckpointError(
        f"{folder}: {type(tokenizer).__name__} gives other tokens than sentencepiece ({said}); name the "
        "tokenizer_class in tokenizer_config.json, or add tokenizer.json"
    )


def _read_template(folder: Path, wanted: str | None) -> tuple[str | None, dict[str, str]]:
    """Return the chat template, and what was chosen where there are several."""
    template, choice = read_chat_template(folder, wanted)
    return template, {} if choice is None else {"chat_template": choice}
