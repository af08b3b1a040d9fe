"""LoRA adapters over their base: the runtime, and every merged tensor, against PEFT's own model and merge."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaModel, LlamaPreTrainedModel

from checkpoints import edit_json, make_tokenizer, write_openrlhf
from checkpoints_value_head import (
    make_head,
    randomize_adapter,
    values_at_the_end,
    write_head_file,
    write_language_model,
)
from rewardrt import RewardModel, RewardRTError
from rewardrt.cli.app import app
from rewardrt_export.checkpoint import read_checkpoint
from rewardrt_export.pipeline import export
from rewardrt_export.source.adapter_config import KNOWN_FIELDS, find_adapter
from rewardrt_export.source.adapters import merge_adapter
from rewardrt_export.source.folder import read_source
from rewardrt_export.source.weights import read_tensors
from texts import make_conversations

TOLERANCE = 1e-4  # standard deviations of the reward
TARGETS = ["q_proj", "v_proj", "down_proj"]


class OpenRLHFRewardModel(LlamaPreTrainedModel):
    """The shape of the class that OpenRLHF makes at run time."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        position_ids = attention_mask.long().cumsum(-1) - 1
        position_ids.masked_fill_(attention_mask == 0, 1)
        hidden = self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids).last_hidden_state
        return self.score(hidden).squeeze(-1)[:, -1]  # left-padded: the last position is never padding


def adapt(model: nn.Module, folder: Path, **config: Any) -> Any:
    """Put a random adapter on the model, save it as PEFT does, and return the PEFT model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about embeddings and patterns
        adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **config}))
        randomize_adapter(adapted)
        adapted.save_pretrained(folder)
    return adapted.eval()


def load_adapted(model: nn.Module, folder: Path) -> Any:
    """Load what was saved, as a user of PEFT would."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT still asks transformers for names that go away
        return PeftModel.from_pretrained(model, folder).eval()


def check_rewards(bundle: Path, rows: list[dict[str, Any]], expected: np.ndarray) -> None:
    assert expected.std() > 0.1
    runtime = RewardModel.load(bundle, provider="cpu")
    single = np.array([runtime.score_many([row])[0] for row in rows])
    batched = RewardModel.load(bundle, provider="cpu", padding=True).score_many(rows)
    assert np.abs(single - expected).max() < TOLERANCE * expected.std()
    assert np.abs(batched - expected).max() < TOLERANCE * expected.std()


def test_a_classifiers_adapter_scores_as_its_peft_model(tmp_path: Path) -> None:
    write_language_model(tmp_path / "base", pad_token_id=None)
    load = {"num_labels": 1, "pad_token_id": 3, "attn_implementation": "eager"}
    adapt(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **load),
        tmp_path / "adapter",
        task_type="SEQ_CLS",
        rank_pattern={"down_proj": 6},
        alpha_pattern={r"layers\.1\.self_attn\.q_proj": 2},
    )
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    # Nothing names the base but the adapter's own config, as it was trained.
    bundle = export(tmp_path / "adapter", tmp_path / "bundle")
    assert bundle.manifest.spec.family == "sequence-classification"
    assert bundle.manifest.provenance.checkpoint == "adapter on base"
    assert bundle.manifest.spec.taps[0].ids == (3,)  # the tokenizer's pad, which the base's config has not
    reference = load_adapted(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **load), tmp_path / "adapter"
    )
    conversations = make_conversations(24, longest=20)
    tokens = make_tokenizer().apply_chat_template(conversations, tokenize=True, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = reference(**tokens).logits[:, 0].numpy()
    check_rewards(tmp_path / "bundle", [{"messages": messages} for messages in conversations], expected)


def test_an_openrlhf_adapter_scores_as_its_peft_model_under_left_padding(tmp_path: Path) -> None:
    base = write_language_model(tmp_path / "base")
    model = OpenRLHFRewardModel(base.config)
    model.model.load_state_dict(base.model.state_dict())
    reference = adapt(model, tmp_path / "adapter", modules_to_save=["score"], use_rslora=True)
    # OpenRLHF writes the class's config.json beside the adapter.
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(config | {"value_head_prefix": "score"}))
    bundle = export(tmp_path / "adapter", tmp_path / "bundle", base=tmp_path / "base")
    assert bundle.manifest.spec.family == "openrlhf"
    conversations = make_conversations(24, longest=20)
    tokenizer = make_tokenizer()
    texts = [tokenizer.apply_chat_template(each, tokenize=False).rstrip("\n") + " </s>" for each in conversations]
    tokenizer.padding_side = "left"
    tokens = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = reference(tokens["input_ids"], attention_mask=tokens["attention_mask"]).numpy()
    check_rewards(tmp_path / "bundle", [{"messages": messages} for messages in conversations], expected)


def test_a_llama_factory_adapter_with_its_value_head_beside_scores_as_its_peft_model(tmp_path: Path) -> None:
    write_language_model(tmp_path / "base", "qwen2")
    adapt(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        tmp_path / "adapter",
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_dora=True,
    )
    head = make_head(32)
    write_head_file(tmp_path / "adapter" / "value_head.safetensors", head)
    bundle = export(tmp_path / "adapter", tmp_path / "bundle")
    assert bundle.manifest.spec.family == "value-head"
    reference = load_adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    conversations = make_conversations(24, longest=20)
    ids = [make_tokenizer().apply_chat_template(each, tokenize=True)["input_ids"] for each in conversations]
    expected = torch.cat([values_at_the_end(reference, head, ids[i : i + 8]) for i in range(0, 24, 8)]).numpy()
    check_rewards(tmp_path / "bundle", [{"messages": messages} for messages in conversations], expected)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"^model.layers.0.*q_proj": 2, "v_proj": 8}, "alpha_pattern": {"q_proj": 1}},
    "dora": {"use_dora": True},
    "every bias": {"bias": "all"},
    "a bias of LoRA's own": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "norms saved whole": {"modules_to_save": ["input_layernorm", "lm_head"]},
    "some layers": {"layers_to_transform": [1]},
    "by regex": {"target_modules": r".*layers\.1\..*(q_proj|up_proj)"},
    "orthogonal start": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_is_what_pefts_own_merge_gives(tmp_path: Path, variant: str) -> None:
    write_language_model(tmp_path / "base", "qwen2")  # its q, k and v have biases
    model = adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter", **VARIANTS[variant])
    check_merge(tmp_path, model)


def test_layers_with_weights_the_other_way_round_are_merged_as_peft_does(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    for index, dora in enumerate((False, True)):
        model = adapt(
            GPT2LMHeadModel.from_pretrained(tmp_path / "base"),
            tmp_path / f"adapter{index or ''}",
            target_modules=["c_attn", "c_proj"],
            fan_in_fan_out=True,
            use_dora=dora,
        )
        check_merge(tmp_path, model, f"adapter{index or ''}")


def check_merge(folder: Path, model: Any, name: str = "adapter") -> None:
    adapter = find_adapter(folder / name)
    assert adapter is not None
    before = read_tensors(folder / "base")
    merged = merge_adapter(adapter, before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model.merge_and_unload().state_dict()
    changed = 0
    for key, tensor in merged.items():
        found, theirs = tensor.read(), expected[key]
        assert found.shape == tensor.shape == theirs.shape
        assert torch.allclose(found, theirs, rtol=1e-6, atol=1e-6), key
        changed += key not in before or not torch.equal(before[key].read(), found)
    assert changed >= 2


def test_a_half_precision_base_and_adapter_are_merged_in_float32(tmp_path: Path) -> None:
    base = write_language_model(tmp_path / "base").to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    adapt(model, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    saved = {name: tensor.to(torch.bfloat16) for name, tensor in saved.items()}
    save_file(saved, tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (saved[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    exact = load_file(tmp_path / "base" / "model.safetensors")[f"{name}.weight"].double() + 6 / 4 * b @ a
    adapter = find_adapter(tmp_path / "adapter")
    assert adapter is not None
    found = merge_adapter(adapter, read_tensors(tmp_path / "base"))[f"{name}.weight"]
    assert found.dtype == found.read().dtype == torch.float32
    assert (found.read() - exact).abs().max() < 1e-5
    assert (found.read().bfloat16() - exact).abs().max() > 1e-3  # what merging in bfloat16 would have lost


def test_an_adapter_in_a_bin_file_over_a_bare_backbone_and_trls_head_file_are_read(tmp_path: Path) -> None:
    model = write_language_model(tmp_path / "base")
    write_language_model(tmp_path / "bare")
    model.model.save_pretrained(tmp_path / "bare")  # names without `model.` before them
    adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter", task_type="CAUSAL_LM")
    write_head_file(tmp_path / "adapter" / "value_head.safetensors", make_head(32))
    expected = read_checkpoint(tmp_path / "adapter")
    tensors = {name: source.read() for name, source in expected.backbone.sources.items()}
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    torch.save(saved, tmp_path / "adapter" / "adapter_model.bin")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter" / "value_head.safetensors").unlink()
    write_head_file(tmp_path / "adapter" / "pytorch_model.bin", make_head(32))  # what TRL calls it
    edit_json(tmp_path / "bare" / "config.json", architectures=["LlamaForCausalLM"])
    found = read_checkpoint(tmp_path / "adapter", base=tmp_path / "bare")
    assert found.spec == expected.spec
    for name, tensor in tensors.items():
        assert torch.equal(found.backbone.sources[name].read(), tensor)
    assert torch.equal(found.head().sources["weight_0_0"](), make_head(32).weight)


def test_tokens_added_in_training_bring_their_embeddings(tmp_path: Path) -> None:
    write_language_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(304)
    adapt(model, tmp_path / "adapter", task_type="CAUSAL_LM")
    write_head_file(tmp_path / "adapter" / "value_head.safetensors", make_head(32))
    checkpoint = read_checkpoint(tmp_path / "adapter")
    assert torch.equal(checkpoint.backbone.sources["embed_tokens.weight"].read(), model.model.embed_tokens.weight)


def saved_tensors(folder: Path) -> Path:
    return folder / "adapter" / "adapter_model.safetensors"


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(saved_tensors(folder))
    edit(state)
    save_file(state, saved_tensors(folder))


def configure(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "adapter" / "adapter_config.json", **changes)


LAYER = "base_model.model.model.layers.1.self_attn.q_proj"
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "trap 2, the head that modules_to_save names lost in the save": (
        lambda f: change(f, lambda state: state.pop("base_model.model.score.weight")),
        "modules_to_save lists classifier, score, and the adapter has no tensor of them: the head was lost in the save",
    ),
    "trap 2, a classifier trained without modules_to_save": (
        lambda f: (
            change(f, lambda state: state.pop("base_model.model.score.weight")),
            configure(modules_to_save=None)(f),
        ),
        "no reward head: the sequence-classification spec needs score.weight ['outputs', 32], and the checkpoint has not",
    ),
    "trap 2, a language model's adapter with its value head left behind": (
        lambda f: (
            change(f, lambda state: state.pop("base_model.model.score.weight")),
            configure(modules_to_save=None, task_type="CAUSAL_LM")(f),
        ),
        "beside the backbone it has lm_head.weight; the adapter lost its head (modules_to_save: nothing), and no value_head "
        "file is beside it",
    ),
    "trap 2, LoRA on a new head whose own weight was never saved": (
        lambda f: change(
            f,
            lambda state: state.update(
                {
                    "base_model.model.head.lora_A.weight": torch.ones(4, 32),
                    "base_model.model.head.lora_B.weight": torch.ones(1, 4),
                }
            ),
        ),
        "base has no head.weight: it belongs to another base, or that layer's own weight was new and never saved",
    ),
    "trap 1, a head that was never trained": (
        lambda f: change(f, lambda state: state["base_model.model.score.weight"].zero_()),
        "score.weight: all zeros; the head was never trained",
    ),
    "a head that the reward does not use": (
        lambda f: change(f, lambda state: state.update({"base_model.model.other.weight": torch.ones(1, 32)})),
        "1 tensors are left over, neither LlamaForSequenceClassification's backbone nor its head (score.weight): other",
    ),
    "a module that the base has not": (
        lambda f: change(
            f, lambda s: s.update({k.replace("1.self", "7.self"): s.pop(k) for k in list(s) if LAYER in k})
        ),
        "the adapter changes model.layers.7.self_attn.q_proj, and the base",
    ),
    "a base of another width": (
        lambda f: write_language_model(f / "base", hidden_size=64),
        "changes a weight of [32, 64], and model.layers.0.mlp.down_proj.weight in the base",
    ),
    "half of a pair lost": (
        lambda f: change(f, lambda state: state.pop(f"{LAYER}.lora_B.weight")),
        "model.layers.1.self_attn.q_proj has lora_A.weight; expected lora_A.weight, lora_B.weight",
    ),
    "a layer lost": (
        lambda f: change(f, lambda s: [s.pop(f"{LAYER}.lora_{part}.weight") for part in "AB"]),
        "has nothing for 1 others of the same names in other layers (model.layers.1.self_attn.q_proj.weight): a part of",
    ),
    "a tensor that ZeRO-3 saved empty": (
        lambda f: change(f, lambda state: state.update({f"{LAYER}.lora_A.weight": torch.empty(0)})),
        "self_attn.q_proj.lora_A.weight): a DeepSpeed ZeRO-3 save, for which the processes' parts were not gathered",
    ),
    "another rank than the config says": (configure(r=8), "expected [8, in] and [out, 8], the rank in adapter_config"),
    "magnitudes where there is no DoRA": (
        lambda f: change(f, lambda state: state.update({f"{LAYER}.lora_magnitude_vector": torch.ones(32)})),
        "has lora_A.weight, lora_B.weight, lora_magnitude_vector; expected lora_A.weight, lora_B.weight",
    ),
    "names with an adapter's name in them": (
        lambda f: change(f, lambda s: s.update({f"{LAYER}.lora_A.default.weight": s.pop(f"{LAYER}.lora_A.weight")})),
        "lora_A.default.weight is not a tensor of a LoRA adapter as PEFT saves it",
    ),
    "another kind of adapter": (configure(peft_type="IA3"), "a IA3 adapter; only LORA can be merged exactly"),
    "a start that changes the base": (
        configure(init_lora_weights="pissa"),
        "init_lora_weights 'pissa' trains against a changed base",
    ),
    "a variant that cannot be merged": (
        configure(alora_invocation_tokens=[1, 2], use_something_new=True),
        "alora_invocation_tokens, use_something_new is set, which cannot be merged exactly",
    ),
    "a base that is not here": (
        configure(base_model_name_or_path="meta-llama/Llama-3.1-8B"),
        "an adapter of 'meta-llama/Llama-3.1-8B', which is not a folder here; give its base "
        "with --base FOLDER, or have it downloaded: --base hf://meta-llama/Llama-3.1-8B",
    ),
    "an adapter as a base": (
        lambda f: (f / "base" / "adapter_config.json").write_text("{}"),
        "the base is an adapter itself; merge it into its own base first",
    ),
    "a config without tensors": (
        lambda f: saved_tensors(f).unlink(),
        "adapter_config.json without adapter_model.safetensors or adapter_model.bin; if the adapter is merged",
    ),
    "a merged model and the adapter in one folder": (
        lambda f: save_file({"model.norm.weight": torch.ones(32)}, f / "adapter" / "model.safetensors"),
        "an adapter, and other weights beside it (model.norm.weight); remove adapter_config.json if they are the merged",
    ),
    "a config of another architecture beside it": (
        lambda f: (f / "adapter" / "config.json").write_text('{"model_type": "qwen2"}'),
        "an adapter of a qwen2 model, and",
    ),
}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a classifier's adapter; copy them before changing anything."""
    folder = tmp_path_factory.mktemp("classifier")
    write_language_model(folder / "base")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    adapt(model, folder / "adapter", task_type="SEQ_CLS")
    return folder


@pytest.mark.parametrize("name", WRONG)
def test_an_adapter_that_cannot_be_merged_exactly_is_refused_in_one_line(
    tmp_path: Path, classifier: Path, name: str
) -> None:
    shutil.copytree(classifier, tmp_path, dirs_exist_ok=True)
    configure(base_model_name_or_path=str(tmp_path / "base"))(tmp_path)
    read_checkpoint(tmp_path / "adapter")  # as it was, it is a good one
    damage, message = WRONG[name]
    damage(tmp_path)
    with pytest.raises(RewardRTError) as caught:
        read_checkpoint(tmp_path / "adapter")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_head_in_the_base_serves_an_adapter_without_one_and_the_adapters_own_goes_first(tmp_path: Path) -> None:
    _, head = write_openrlhf(tmp_path / "base")
    model = OpenRLHFRewardModel.from_pretrained(tmp_path / "base")
    for name, saved, expected in (("without", None, head), ("with", ["score"], None)):
        adapted = adapt(model, tmp_path / name, modules_to_save=saved)
        wanted = expected if expected is not None else adapted.base_model.model.score.modules_to_save["default"].weight
        found = read_source(tmp_path / name, tmp_path / "base").stored["score.weight"].read()
        assert torch.equal(found, wanted)
        model = adapted.unload()
    assert read_checkpoint(tmp_path / "without").spec.family == "openrlhf"


def test_the_command_takes_the_base_and_refuses_one_for_a_whole_model(tmp_path: Path, classifier: Path) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["export", *map(str, arguments)])
        assert isinstance(result.exception, RewardRTError)
        return str(result.exception)

    target = tmp_path / "bundle"
    base, adapter = classifier / "base", classifier / "adapter"
    said = run(base, target, "--base", base)
    assert f"--base {base}: {base} is no adapter and leaves nothing out" in said
    said = run(adapter, target, "--base", tmp_path / "nowhere")
    assert said == f"{tmp_path / 'nowhere'}: expected a checkpoint folder, found nothing"
    write_language_model(tmp_path / "other", hidden_size=64)
    assert f"in the base {tmp_path / 'other'} is [64, 64]" in run(adapter, target, "--base", tmp_path / "other")
    assert not target.exists()


def test_every_field_of_pefts_lora_config_is_followed_or_refused() -> None:
    """A new field is refused when it is set; this says when there is one to look at."""
    refused = {
        "alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "kasa_config", "layer_replication",
        "megatron_config", "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora",
        "use_qalora", "velora_config",
    }  # fmt: skip
    assert {*LoraConfig().to_dict()} - KNOWN_FIELDS == refused
