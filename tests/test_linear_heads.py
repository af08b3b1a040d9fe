"""One linear layer under many names: each family against its own published forward, written out here."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from checkpoints import CHATML, edit_json, make_tokenizer
from checkpoints_linear import (
    REWARD_TOKEN,
    Written,
    internlm2_tokenizer,
    tokenizer_ending_with,
    tokenizer_starting_with,
    write_internlm2,
    write_linear,
)
from rewardrt import RewardModel, RewardRTError, RowError, TruncationWarning
from rewardrt.bundle.spec import Affine, Tap
from rewardrt.cli.app import app
from rewardrt.text.rendering import Renderer
from rewardrt.text.rows import parse_row
from rewardrt_export.checkpoint import read_checkpoint
from rewardrt_export.families import FAMILIES
from rewardrt_export.pipeline import export
from texts import make_conversations, make_texts

TOLERANCE = 1e-4  # standard deviations of the reward
TEXTS = 24
Pooling = Callable[[list[int]], int]  # where a padded row of ids is read


def pairs(longest: int = 20) -> list[dict[str, Any]]:
    """Rows of one round; no answer is empty."""
    prompts, answers = make_texts(TEXTS, longest=longest), make_texts(TEXTS, longest=longest, seed=1)
    return [{"prompt": prompt, "response": answer} for prompt, answer in zip(prompts, answers, strict=True)]


def formatted(tokenizer: Any, form: str) -> list[list[int]]:
    """The ids of `pairs()` under a format string, with the tokenizer's own special tokens."""
    return [tokenizer(form.format(**row))["input_ids"] for row in pairs()]


def last_by_mask(written: Written, texts: Sequence[list[int]]) -> np.ndarray:
    """`ends = attention_mask.cumsum(1).argmax(1)` on right-padded batches, as Eurus, Beaver and OpenAssistant read."""
    return np.concatenate([_last_by_mask(written, texts[i : i + 8]) for i in range(0, len(texts), 8)])


def _last_by_mask(written: Written, texts: Sequence[list[int]]) -> np.ndarray:
    ids, mask = pad_right(texts, 3)
    with torch.inference_mode():
        hidden = written.model(input_ids=ids, attention_mask=mask).last_hidden_state
        rewards = (hidden @ written.weight.T + written.bias).squeeze(-1)
        return rewards.gather(1, mask.cumsum(dim=1).argmax(dim=1).view(-1, 1))[:, 0].numpy()


def before_padding(written: Written, texts: Sequence[list[int]], pad: int, skipped: int = 0) -> np.ndarray:
    """`c_inds[skipped] - 1` on right-padded rows, as trlx's reward model and its descendants read."""
    rewards = []
    for text in texts:
        ids = [*text, pad, pad, pad]
        found = [place for place, token in enumerate(ids) if token == pad]
        end = found[skipped] if len(found) > skipped else len(ids)
        rewards.append(written.rewards(ids)[end - 1].item())
    return np.array(rewards, dtype=np.float32)


def pad_right(texts: Sequence[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, texts))
    ids = torch.tensor([text + [pad] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    return ids, mask


def check(bundle: Path, rows: list[dict[str, Any]], expected: np.ndarray) -> None:
    """Assert that the bundle gives these rewards, one text at a time and in padded batches."""
    assert len(rows) >= TEXTS
    assert expected.std() > 0.1
    runtime, padded = (RewardModel.load(bundle, provider="cpu", padding=padding) for padding in (None, True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        single = np.array([runtime.score_many([row])[0] for row in rows])
        batched = padded.score_many(rows)
    worst = max(np.abs(found - expected).max() / expected.std() for found in (single, batched))
    assert worst < TOLERANCE, f"{worst} standard deviations off"


@pytest.mark.parametrize(
    ("backbone", "architecture", "form"),
    [
        ("mistral", "EurusRewardModel", "[INST] {prompt} [/INST] {response}"),
        ("llama", "LlamaRewardModel", "Human: {prompt}\n\nAssistant: {response}"),
    ],
)
def test_eurus_and_ultrarm_score_as_published(tmp_path: Path, backbone: str, architecture: str, form: str) -> None:
    tokenizer = tokenizer_starting_with("<s>", template=None)
    config = {"architectures": [architecture]}
    written = write_linear(
        tmp_path / "rm", backbone, "regression_head", prefix="model.", config=config, tokenizer=tokenizer
    )
    bundle = export(tmp_path / "rm", tmp_path / "bundle")
    assert bundle.manifest.spec.family == "eurus"
    ids = formatted(tokenizer, form)
    assert all(text[0] == 1 and text[-1] != 2 for text in ids)  # BOS once, no EOS
    check(tmp_path / "bundle", pairs(), last_by_mask(written, ids))


def test_eurus_uses_a_chat_template_that_is_there_and_refuses_a_backbone_without_one(tmp_path: Path) -> None:
    config = {"architectures": ["EurusRewardModel"]}
    write_linear(tmp_path / "rm", "mistral", "regression_head", prefix="model.", config=config)
    assert read_checkpoint(tmp_path / "rm").spec.text.source == "chat_template"
    bare = make_tokenizer(template=None)
    write_linear(tmp_path / "odd", "qwen2", "regression_head", prefix="model.", config=config, tokenizer=bare)
    with pytest.raises(RewardRTError, match="knows its text for mistral, llama only, not qwen2"):
        read_checkpoint(tmp_path / "odd")


def starling_tokenizer(**options: Any) -> Any:
    """Llama-2's: BOS first, padded with <unk>."""
    return tokenizer_starting_with("<s>", pad="<unk>", **options)


def test_starling_reads_before_the_first_unk_of_its_llama_2_text(tmp_path: Path) -> None:
    tokenizer = starling_tokenizer()
    written = write_linear(
        tmp_path / "rm", "llama", "v_head", prefix="transformer.", config={}, tokenizer=tokenizer, raw=True
    )
    bundle = export(tmp_path / "rm", tmp_path / "bundle", base=tmp_path / "base")
    assert bundle.manifest.spec.family == "starling"
    rows = pairs()
    for row in rows[::4]:
        row["response"] = "one<unk> two"
    form = "<s>[INST] {prompt} </s> [/INST] {response}</s>"
    ids = [tokenizer(form.format(**row))["input_ids"] for row in rows]
    assert all(text[:2] == [1, 1] and text[-1] == 2 for text in ids)  # the card's text, tokenized as on the card
    check(tmp_path / "bundle", rows, before_padding(written, ids, pad=0))


def test_starling_34b_uses_its_chat_template_and_is_no_sequence_classifier(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForSequenceClassification"]}
    write_linear(tmp_path / "rm", "llama", "v_head", prefix="transformer.", config=config)
    spec = read_checkpoint(tmp_path / "rm").spec
    assert (spec.family, spec.text.source) == ("starling", "chat_template")
    assert spec.taps == (Tap("last", "before_first_id", (0,)),)


def internlm2_rewards(config: dict[str, Any], state: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """InternLM2ForRewardModel's forward in plain torch: the head at every position of one text."""
    heads, groups, dim = config["num_attention_heads"], config["num_key_value_heads"], 8
    scaling = config.get("rope_scaling") or {"type": "none"}
    place = torch.arange(len(ids)) / (scaling["factor"] if scaling["type"] == "linear" else 1.0)
    angles = place[:, None] * config["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.cat([angles, angles], -1)  # [tokens, dim]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]) * state[f"{name}.weight"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", torch.zeros(()))

    def rotate(x: torch.Tensor) -> torch.Tensor:  # [tokens, heads, dim]
        turned = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
        return x * angles.cos()[:, None] + turned * angles.sin()[:, None]

    x = state["model.tok_embeddings.weight"][ids]
    causal = torch.full((len(ids), len(ids)), -math.inf).triu(1)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        shared = heads // groups
        # rearrange "b q (h gs d) -> b q h gs d": per key/value head its queries, then the key, then the value
        qkv = linear(norm(x, f"{name}.attention_norm"), f"{name}.attention.wqkv").view(
            len(ids), groups, shared + 2, dim
        )
        query = rotate(qkv[:, :, :shared].reshape(len(ids), heads, dim))
        key = rotate(qkv[:, :, -2]).repeat_interleave(shared, 1)
        value = qkv[:, :, -1].repeat_interleave(shared, 1)
        scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(dim) + causal
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).reshape(len(ids), heads * dim)
        x = x + linear(mixed, f"{name}.attention.wo")
        normed = norm(x, f"{name}.ffn_norm")
        gated = torch.nn.functional.silu(linear(normed, f"{name}.feed_forward.w1"))
        x = x + linear(gated * linear(normed, f"{name}.feed_forward.w3"), f"{name}.feed_forward.w2")
    return (norm(x, "model.norm") @ state["v_head.weight"].T)[:, 0]


@pytest.mark.parametrize(
    ("knows_reward_token", "bias", "scaling"),
    [(True, True, {"type": "dynamic", "factor": 3.0}), (False, False, {"type": "linear", "factor": 2.0})],
    ids=["template-ends-with-the-token", "token-appended"],
)
def test_internlm2_scores_as_published_from_its_own_layout(
    tmp_path: Path, knows_reward_token: bool, bias: bool, scaling: dict[str, Any]
) -> None:
    tokenizer = internlm2_tokenizer(knows_reward_token=knows_reward_token)
    reward_id = tokenizer.convert_tokens_to_ids(REWARD_TOKEN) if knows_reward_token else 305
    config, state = write_internlm2(
        tmp_path / "rm", reward_id=reward_id, tokenizer=tokenizer, bias=bias, rope_scaling=scaling
    )
    bundle = export(tmp_path / "rm", tmp_path / "bundle", max_length=200)
    assert bundle.manifest.spec.family == "internlm2-reward"
    assert bundle.manifest.spec.backbone == "llama"
    conversations = make_conversations(TEXTS, longest=25)
    ids = [tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"] for messages in conversations]
    if not knows_reward_token:
        ids = [[*text, reward_id] for text in ids]
    assert all(text.count(reward_id) == 1 and text[-1] == reward_id for text in ids)
    ids = [[*text[: min(len(text), 200) - 1], reward_id] for text in ids]  # after a cut too
    assert 3 <= sum(len(text) == 200 for text in ids) <= TEXTS - 3
    expected = np.array([internlm2_rewards(config, state, text)[-1].item() for text in ids], dtype=np.float32)
    check(tmp_path / "bundle", [{"messages": messages} for messages in conversations], expected)


def test_internlm2_refuses_what_would_be_a_wrong_reward(tmp_path: Path) -> None:
    tokenizer = internlm2_tokenizer(knows_reward_token=True)
    write_internlm2(tmp_path / "rm", reward_id=300, tokenizer=tokenizer, bias=False)
    for changes, message in (
        ({"reward_token_id": 999}, "reward_token_id 999: expected the id of a token"),
        ({"reward_token_id": None}, "reward_token_id None: expected the id of a token"),
        ({"reward_token_id": 300, "num_key_value_heads": 4}, "wqkv.weight: expected 96 rows"),
        ({"num_key_value_heads": 2, "_name_or_path": "internlm/POLAR-7B"}, "POLAR compares an answer with a reference"),
        ({"_name_or_path": "", "bias": True}, "tensors are not in the checkpoint"),
    ):
        edit_json(tmp_path / "rm" / "config.json", **changes)
        with pytest.raises(RewardRTError, match=message):
            read_checkpoint(tmp_path / "rm")
    (tmp_path / "rm" / "tokenizer.json").rename(tmp_path / "rm" / "tokenizer.model")
    with pytest.raises(RewardRTError, match=r"no tokenizer\.json, and a tokenizer with code of its own"):
        read_checkpoint(tmp_path / "rm")


def test_athene_reads_at_the_cls_token_that_it_appends_after_the_cut(tmp_path: Path) -> None:
    tokenizer = tokenizer_starting_with("<s>", template="{{ bos_token }}" + CHATML)
    tokenizer.add_special_tokens({"cls_token": "<|cls|>"})
    config = {"architectures": ["AtheneForSequenceClassification"]}
    written = write_linear(
        tmp_path / "rm", "llama", "v_head", prefix="model.", config=config, tokenizer=tokenizer, vocab_size=304
    )
    bundle = export(tmp_path / "rm", tmp_path / "bundle", max_length=200)
    assert bundle.manifest.spec.family == "athene"
    conversations = make_conversations(TEXTS, longest=25)
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) + "<|cls|>" for messages in conversations]
    ids = tokenizer(texts)["input_ids"]
    cls = tokenizer.cls_token_id
    assert all(text[:2] == [1, 1] and text[-1] == cls for text in ids)  # two BOS, as in AtheneRewardPipeline
    ids = [[*text[: min(len(text), 200) - 1], cls] for text in ids]
    assert 3 <= sum(len(text) == 200 for text in ids) <= TEXTS - 3
    expected = np.array(
        [written.rewards(text)[max(place for place, token in enumerate(text) if token == cls)].item() for text in ids]
    )
    check(tmp_path / "bundle", [{"messages": messages} for messages in conversations], expected)


def normaliser(mean: float, var: float) -> dict[str, torch.Tensor]:
    return {
        "normalizer.mean": torch.tensor([mean]),
        "normalizer.var": torch.tensor([var]),
        "normalizer.count": torch.tensor([640]),
    }


BEAVER_CONFIG = {"architectures": ["LlamaForScore"], "score_dim": 1, "do_normalize": False}
BEAVER_TEXT = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}</s>"


def write_beaver(folder: Path, score_type: str, **options: Any) -> Written:
    config = BEAVER_CONFIG | {"score_type": score_type} | options.pop("config", {})
    tokenizer = tokenizer_starting_with("<s>")  # its chat template is not what safe-rlhf trains on
    return write_linear(folder, "llama", "score_head", prefix="model.", config=config, tokenizer=tokenizer, **options)


def test_beaver_scores_as_published_and_normalises_on_request(tmp_path: Path) -> None:
    written = write_beaver(tmp_path / "rm", "reward", bias=True, extra=normaliser(0.75, 6.25), config={"bias": True})
    bundle = export(tmp_path / "rm", tmp_path / "bundle")
    assert bundle.manifest.spec.family == "beaver"
    ids = formatted(written.tokenizer, BEAVER_TEXT)
    expected = last_by_mask(written, ids)
    check(tmp_path / "bundle", pairs(), expected)
    found = RewardModel.load(tmp_path / "bundle", provider="cpu").score_many(pairs(), normalize=True)
    assert np.abs(found - (expected - 0.75) / (np.sqrt(6.25) + 1e-8)).max() < TOLERANCE


def test_beaver_costs_keep_their_sign_and_a_spec_turns_it(tmp_path: Path) -> None:
    written = write_beaver(tmp_path / "rm", "cost", config={"mean": [0.75], "var": [6.25]})
    spec = read_checkpoint(tmp_path / "rm").spec
    assert (spec.family, spec.output.function) == ("beaver-cost", "identity")
    assert spec.normalise == Affine(0.0, 2.5, 1e-8)  # costs are scaled, never shifted
    (tmp_path / "harmless.toml").write_text(
        '[[heads]]\nlayers = [{weight = "score_head.weight"}]\n[output]\nfunction = "negate"\n[text]\nsource = "format"\n'
        'format = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}</s>"\nadd_special_tokens = true\n'
    )
    export(tmp_path / "rm", tmp_path / "negated", spec_file=tmp_path / "harmless.toml")
    check(tmp_path / "negated", pairs(), -last_by_mask(written, formatted(written.tokenizer, BEAVER_TEXT)))


def test_beaver_normalisers_are_the_saved_buffers_else_the_config_and_none_where_never_updated(tmp_path: Path) -> None:
    for name, extra, config, expected in (
        ("buffers", normaliser(0.5, 4.0), {"mean": [9.0], "var": [9.0]}, Affine(0.5, 2.0, 1e-8)),
        ("config", {}, {"mean": [0.5], "var": [4.0]}, Affine(0.5, 2.0, 1e-8)),
        ("untouched", normaliser(0.0, 1.0), {}, None),
    ):
        write_beaver(tmp_path / name, "reward", extra=extra, config=config)
        assert read_checkpoint(tmp_path / name).spec.normalise == expected
    write_beaver(tmp_path / "broken", "reward", extra=normaliser(0.0, 0.0))
    with pytest.raises(RewardRTError, match=r"the normaliser's var is 0.0; expected a positive number"):
        read_checkpoint(tmp_path / "broken")
    edit_json(tmp_path / "config" / "config.json", score_type="critic")
    with pytest.raises(RewardRTError, match="score_type 'critic': expected reward or cost"):
        read_checkpoint(tmp_path / "config")


def test_a_second_round_is_refused_where_the_text_rule_knows_one(tmp_path: Path) -> None:
    write_beaver(tmp_path / "rm", "reward")
    rule = read_checkpoint(tmp_path / "rm").spec.text
    rounds = [messages for messages in make_conversations(8) if len(messages) > 2]
    row = {"messages": rounds[0]}
    with pytest.raises(RowError, match="found a longer conversation"):
        Renderer(rule, None).render(parse_row(row).items[0])


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_openassistant_pythia_pools_as_its_config_says(tmp_path: Path, pooling: str) -> None:
    tokenizer = tokenizer_ending_with("<|endoftext|>", template=None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|prompter|>", "<|assistant|>"]})
    config = {"architectures": ["GPTNeoXRewardModel"], "model_type": "gpt_neox_reward_model", "pooling": pooling}
    written = write_linear(
        tmp_path / "rm",
        "gpt_neox",
        "out_proj",
        prefix="gpt_neox.",
        bias=True,
        config=config,
        tokenizer=tokenizer,
        vocab_size=304,
    )
    bundle = export(tmp_path / "rm", tmp_path / "bundle")
    assert bundle.manifest.spec.family == "openassistant-pythia"
    ids = formatted(tokenizer, "<|prompter|>{prompt}<|endoftext|><|assistant|>{response}<|endoftext|>")
    # out_proj is linear: its value at the mean state is the mean of its values.
    mean = np.array([written.rewards(text).mean().item() for text in ids], dtype=np.float32)
    check(tmp_path / "bundle", pairs(), last_by_mask(written, ids) if pooling == "last" else mean)


def test_deepspeed_chat_reads_before_the_first_eos_not_counting_opts_first_token(tmp_path: Path) -> None:
    tokenizer = tokenizer_starting_with("</s>")
    # DeepSpeed-Chat rounds the vocabulary up to a multiple of 8; the base model's config does not know.
    written = write_linear(
        tmp_path / "rm",
        "opt",
        "v_head",
        prefix="rwtransformer.",
        config={"architectures": ["OPTForCausalLM"], "vocab_size": 300},
        tokenizer=tokenizer,
        raw=True,
        vocab_size=304,
    )
    bundle = export(tmp_path / "rm", tmp_path / "bundle", base=tmp_path / "base")
    assert bundle.manifest.spec.family == "deepspeed-chat"
    rows = pairs()
    for row in rows[::4]:
        row["response"] = " yes</s> no"
    ids = [tokenizer(row["prompt"] + row["response"] + "<|endoftext|>")["input_ids"] for row in rows]
    assert all(text[0] == 2 for text in ids)
    check(tmp_path / "bundle", rows, before_padding(written, ids, pad=2, skipped=1))


def test_deepspeed_chat_reads_before_a_closing_eos_and_llama_pads_with_its_own_token(tmp_path: Path) -> None:
    tokenizer = tokenizer_ending_with("<|endoftext|>")
    config = {"architectures": ["GPTNeoXForCausalLM"]}
    written = write_linear(
        tmp_path / "rm",
        "gpt_neox",
        "v_head",
        prefix="rwtransformer.",
        config=config,
        tokenizer=tokenizer,
        vocab_size=304,
    )
    export(tmp_path / "rm", tmp_path / "bundle")
    ids = [tokenizer(row["prompt"] + row["response"] + "<|endoftext|>")["input_ids"] for row in pairs()]
    assert all(text.index(tokenizer.eos_token_id) == len(text) - 1 for text in ids)
    check(tmp_path / "bundle", pairs(), before_padding(written, ids, pad=tokenizer.eos_token_id))
    write_linear(tmp_path / "llama", "llama", "v_head", prefix="rwtransformer.", config={})
    assert read_checkpoint(tmp_path / "llama").spec.taps == (Tap("last", "before_first_id", (3,)),)


def test_trlx_reads_before_the_first_eos_of_a_bare_state_dict(tmp_path: Path) -> None:
    tokenizer = tokenizer_ending_with("<|endoftext|>", template=None)
    masks = {
        f"transformer.h.{layer}.attn.{name}": torch.ones(1) for layer in (0, 1) for name in ("bias", "masked_bias")
    }
    written = write_linear(
        tmp_path / "rm",
        "gpt2",
        "v_head",
        prefix="transformer.",
        config={"architectures": ["GPT2LMHeadModel"]},
        extra=masks,  # causal masks, which old transformers versions saved
        tokenizer=tokenizer,
        raw=True,
        vocab_size=304,
    )
    runner = CliRunner().invoke(
        app, ["export", str(tmp_path / "rm"), str(tmp_path / "bundle"), "--base", str(tmp_path / "base")]
    )
    assert runner.exit_code == 0, runner.output
    runtime = RewardModel.load(tmp_path / "bundle", provider="cpu")
    assert runtime.spec.family == "trlx"
    rows = pairs()
    for row in rows[::4]:
        row["response"] = "cut<|endoftext|>off"
    ids = [tokenizer("<|startoftext|>{prompt}\n{response}<|endoftext|>".format(**row))["input_ids"] for row in rows]
    check(tmp_path / "bundle", rows, before_padding(written, ids, pad=tokenizer.eos_token_id))


def test_a_bare_state_dict_without_its_base_says_what_is_missing(tmp_path: Path) -> None:
    write_linear(tmp_path / "rm", "llama", "v_head", prefix="transformer.", config={}, raw=True)
    with pytest.raises(RewardRTError, match=r"config\.json: no such file"):
        read_checkpoint(tmp_path / "rm")
    with pytest.raises(RewardRTError, match="nowhere: expected a checkpoint folder, found nothing"):
        read_checkpoint(tmp_path / "rm", base=tmp_path / "nowhere")
    (tmp_path / "base" / "tokenizer.json").unlink()
    with pytest.raises(RewardRTError, match="no tokenizer; expected"):
        read_checkpoint(tmp_path / "rm", base=tmp_path / "base")


@pytest.mark.parametrize(
    ("backbone", "head", "prefix", "config", "family"),
    [
        ("mistral", "regression_head", "model.", {"architectures": ["EurusRewardModel"]}, "eurus"),
        ("llama", "v_head", "transformer.", {"architectures": ["LlamaForCausalLM"]}, "starling"),
        ("llama", "v_head", "model.", {"architectures": ["AtheneForSequenceClassification"]}, "athene"),
        ("llama", "score_head", "model.", {"architectures": ["LlamaModelForScore"], "score_type": "reward"}, "beaver"),
        ("llama", "score_head", "model.", {"score_type": "cost"}, "beaver-cost"),
        ("gpt_neox", "out_proj", "gpt_neox.", {"architectures": ["GPTNeoXRewardModel"]}, "openassistant-pythia"),
        ("opt", "v_head", "rwtransformer.", {"architectures": ["OPTForCausalLM"]}, "deepspeed-chat"),
        ("gpt2", "v_head", "transformer.", {"architectures": ["GPT2LMHeadModel"]}, "trlx"),
    ],
)
def test_the_folder_alone_tells_the_family(
    tmp_path: Path, backbone: str, head: str, prefix: str, config: dict[str, Any], family: str
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "<|cls|>"})
    folder = tmp_path / "rm"
    write_linear(folder, backbone, head, prefix=prefix, config=config, tokenizer=tokenizer, vocab_size=304)
    checkpoint = read_checkpoint(folder)
    assert checkpoint.spec.family == family
    matching = [name for name, row in FAMILIES.items() if row.matches(checkpoint.source)]
    assert matching == [family]


def test_a_head_that_is_left_over_or_never_trained_stops_the_export(tmp_path: Path) -> None:
    config = {"architectures": ["EurusRewardModel"]}
    extra = {"v_head.weight": torch.randn(1, 32)}
    write_linear(tmp_path / "two", "mistral", "regression_head", prefix="model.", config=config, extra=extra)
    with pytest.raises(RewardRTError, match=r"1 tensors are left over.*v_head\.weight"):
        read_checkpoint(tmp_path / "two")
    zeros = {"v_head.weight": torch.zeros(1, 32)}
    write_linear(tmp_path / "zeros", "llama", "v_head", prefix="transformer.", config={}, extra=zeros)
    with pytest.raises(RewardRTError, match=r"v_head\.weight: all zeros"):
        read_checkpoint(tmp_path / "zeros")
