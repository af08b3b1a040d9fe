"""A checkpoint folder as it is on disk: config.json, tensors by name, tokenizer. Nothing here knows families.

Checkpoints that need a second folder, or whose layout transformers has no class for, are made uniform here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from rewardrt.errors import CheckpointError
from rewardrt_export.places import check_checkpoint
from rewardrt_export.source.adapter_config import Adapter, find_adapter
from rewardrt_export.source.adapters import merge_adapter
from rewardrt_export.source.chat_template import read_chat_template
from rewardrt_export.source.config import (
    CONFIG_FILE,
    VOCABULARY_TENSORS,
    check_size,
    fit_vocabulary,
    follow_vocabulary,
    layout_of,
    read_config,
)
from rewardrt_export.source.multimodal import text_config, text_tensors
from rewardrt_export.source.padding import Padding, read_padding
from rewardrt_export.source.text_files import read_json
from rewardrt_export.source.tokenizer import TokenizerChoice, TrainedTokenizer
from rewardrt_export.source.tokenizer_files import find_tokenizer_files
from rewardrt_export.source.tokenizer_loader import read_tokenizer
from rewardrt_export.source.weights import StoredTensor, check_weights, read_file, read_tensors, shorten

# Files in which LLaMA-Factory and TRL save a value head next to a model. Next to an adapter, TRL uses the name of a
# whole model's weights.
VALUE_HEAD_FILES = ("value_head.safetensors", "value_head.bin", "v_head.bin")
FILES_BESIDE_ADAPTERS = (*VALUE_HEAD_FILES, "model.safetensors", "pytorch_model.bin")
# The classes in which PEFT's task types are trained, by model_type; the base's config.json names another class.
TASK_CLASSES: dict[str, dict[str, str]] = {
    "SEQ_CLS": dict(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    "TOKEN_CLS": dict(MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
}
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining")
_LANGUAGE_MODEL_HEAD = re.compile(r"(pretrained_model\.)?(lm_head|embed_out)\.(weight|bias)")


@dataclass(frozen=True)
class Source:
    """The contents of a checkpoint, from which a family is recognised and its spec is made.

    An adapter looks like the whole model that was trained: its base's config and the merged tensors. `unused` are
    tensors that the reward does not use, each with the reason.
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
    # Where the files were ambiguous: what was chosen, by subject. Export prints each as a line, and the manifest stores
    # them.
    choices: dict[str, str] = field(default_factory=dict)
    trained: TrainedTokenizer | None = None  # `tokenizer`, and why it was chosen

    @property
    def architecture(self) -> str:
        """The first of config.json's `architectures`, or a description of a config without one."""
        found = self.raw.get("architectures")
        return str(found[0]) if isinstance(found, list) and found else "a model without architectures"

    @property
    def says_base_model(self) -> bool:
        """Whether config.json names no class with a reward head, but a base model, a language model, or nothing.

        It is then the base model's own file, which trainers leave next to the weights, and says nothing about the head.
        """
        found = self.raw.get("architectures")
        if not (isinstance(found, list) and found):
            return True
        bare = type(self.config).__name__.replace("Config", "Model")
        return self.architecture == bare or self.architecture.endswith(LANGUAGE_MODELS)

    @property
    def parameters(self) -> int:
        """The number of values in all stored tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.stored.values())

    @property
    def width(self) -> int:
        """The size of the backbone's last hidden state (small OPT models project it to another size at the end)."""
        width: int = getattr(self.config, "word_embed_proj_dim", None) or self.config.hidden_size
        return width

    @property
    def pad_id(self) -> int | None:
        """The id that training padded with, or None if transformers reads the last token; noted in `choices`.

        Raises CheckpointError if the files allow two readings.
        """
        return self.choose_pad_id()

    def choose_pad_id(self, *, required: bool = False) -> int | None:
        """Return `pad_id`; with `required`, the tokenizer's if there is none."""
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

    If the folder lacks config.json or the tokenizer, they are read from the folder `base`. `pad_token` is the token, or
    its id, that training padded with. `chat_template` is the name of one of several templates, or a file. `tokenizer`
    says which of two tokenizers is taken if they differ. Raises CheckpointError naming the file that is missing or
    damaged.
    """
    check_checkpoint(folder, base)
    adapter = find_adapter(folder, base)
    if adapter is not None:
        return _read_adapter_source(adapter, pad_token, chat_template, tokenizer)
    check_weights(folder)
    described = folder if base is None or (folder / CONFIG_FILE).is_file() else base
    raw = read_json(described / CONFIG_FILE)
    config = read_config(described, raw)
    stored, unused = text_tensors(config, _read_whole(folder))
    config = text_config(config)
    check_size(config, stored)
    if (layout := layout_of(raw)) is not None:
        stored = layout.tensors(stored, raw)
    if described != folder:
        fit_vocabulary(config, stored)
    tokenized = folder if base is None or find_tokenizer_files(folder) else base
    if base is not None and described == tokenized == folder:
        raise CheckpointError(f"--base {base}: {folder} is no adapter and leaves nothing out; export it without --base")
    template, choices = _read_template(tokenized, chat_template)
    trained = read_tokenizer(tokenized, config if tokenized == described and layout is None else None, tokenizer)
    padding = read_padding(trained.tokenizer, config, borrowed=False, given=pad_token)
    choices |= _tokenizer_choice(trained)
    return Source(folder, raw, config, stored, trained.tokenizer, template, padding, None, unused, choices, trained)


def _tokenizer_choice(trained: TrainedTokenizer) -> dict[str, str]:
    return {"tokenizer": trained.choice} if trained.choice else {}


def language_model_head(stored: dict[str, StoredTensor]) -> dict[str, str]:
    """Return the tensors of a causal language model's own head, and why a reward may leave them out."""
    reason = "the language model's head: the reward is read off the hidden state"
    return {name: reason for name in stored if _LANGUAGE_MODEL_HEAD.fullmatch(name)}


def _read_whole(folder: Path) -> dict[str, StoredTensor]:
    """Read the tensors of a whole model, and of a value head saved next to it."""
    stored, beside = read_tensors(folder), _read_head_file(folder, VALUE_HEAD_FILES)
    twice = sorted(stored.keys() & beside.keys())
    if twice:
        raise CheckpointError(
            f"{folder}: {shorten(twice)} both in the model's file and in a value head's; remove the one that is stale"
        )
    return stored | beside


def _read_head_file(folder: Path, names: tuple[str, ...]) -> dict[str, StoredTensor]:
    """Read the first of these files that exists; old files name the head's layer just `summary`."""
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
    """Read an adapter as the model that was trained: the base's files, or the adapter's own if it has them."""
    folder, base = adapter.folder, adapter.base
    described = folder if (folder / CONFIG_FILE).is_file() else base
    raw = read_json(described / CONFIG_FILE)
    below = read_json(base / CONFIG_FILE).get("model_type")
    if raw.get("model_type") != below:
        raise CheckpointError(f"{folder}: an adapter of a {raw.get('model_type')} model, and {base} is a {below} model")
    config = read_config(described, raw)
    plain, unused = text_tensors(config, _read_whole(base))
    config = text_config(config)
    check_size(config, plain)
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
    trained = read_tokenizer(tokenized, config if tokenized == described else None, choice)
    padding = read_padding(trained.tokenizer, config, borrowed=described != folder, given=pad_token)
    follow_vocabulary(config, plain, stored)
    stored = _untied_head(config, plain, stored)
    unused |= language_model_head(stored)
    choices |= _tokenizer_choice(trained)
    tokenizer = trained.tokenizer
    return Source(folder, raw, config, stored, tokenizer, template, padding, adapter, unused, choices, trained)


def _untied_head(
    config: PretrainedConfig, plain: dict[str, StoredTensor], stored: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """If an adapter changes tied embeddings, give the head its own tensor, because PEFT leaves the head unchanged."""
    changed = [name for name in plain.keys() & stored.keys() if name.endswith(VOCABULARY_TENSORS)]
    changed = [name for name in changed if stored[name] is not plain[name]]
    if not config.tie_word_embeddings or "lm_head.weight" in stored or len(changed) != 1:
        return stored
    return stored | {"lm_head.weight": dataclasses.replace(plain[changed[0]], name="lm_head.weight")}


def _read_template(folder: Path, wanted: str | None) -> tuple[str | None, dict[str, str]]:
    """Return the chat template, and the choice if there were several."""
    template, choice = read_chat_template(folder, wanted)
    return template, {} if choice is None else {"chat_template": choice}
