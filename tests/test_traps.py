"""The ten traps of serving reward models, each with the test that shows it shut.

Trap 7, a silent sigmoid or softmax, stands with the families that have one; 2 and 9 also stand with adapters and gates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from checkpoints import (
    CHATML,
    add_tensors,
    edit_json,
    make_tokenizer,
    read_tensors,
    write_openrlhf,
    write_sequence_classification,
)
from rewardrt import RewardModel, RewardRTError
from rewardrt_export.pipeline import export
from texts import make_texts

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]


@pytest.fixture(scope="module")
def openrlhf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module, torch.Tensor]:
    """A checkpoint whose pad is its EOS, exported as OpenRLHF; its folder has `rm` and `bundle`."""
    folder = tmp_path_factory.mktemp("traps")
    model, head = write_openrlhf(folder / "rm", tokenizer=make_tokenizer(pad="</s>"), pad_token_id=2)
    export(folder / "rm", folder / "bundle")
    return folder, model, head


def torch_reward(model: torch.nn.Module, head: torch.Tensor, ids: list[int], position: int = -1) -> float:
    with torch.inference_mode():
        return (head @ model(torch.tensor([ids])).last_hidden_state[0, position]).item()


def test_trap_1_a_missing_head_is_never_started_at_random(tmp_path: Path) -> None:
    write_sequence_classification(tmp_path / "rm")
    state = {name: tensor for name, tensor in read_tensors(tmp_path / "rm").items() if name != "score.weight"}
    save_file(state, tmp_path / "rm" / "model.safetensors", metadata={"format": "pt"})
    # transformers gives this folder a model whose head is noise
    _, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", output_loading_info=True)
    assert set(loading["missing_keys"]) == {"score.weight"}
    with pytest.raises(RewardRTError, match=r"no reward head: the sequence-classification spec needs score.weight"):
        export(tmp_path / "rm", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_trap_2_a_head_that_was_lost_among_other_names_stops_the_export(tmp_path: Path) -> None:
    write_openrlhf(tmp_path / "rm")
    state = read_tensors(tmp_path / "rm")
    add_tensors(tmp_path / "rm", {"base_model.score.weight": state["score.weight"]})
    with pytest.raises(RewardRTError, match=r"1 tensors are left over.*: base_model.score.weight"):
        export(tmp_path / "rm", tmp_path / "bundle")


def test_trap_3_pad_equal_to_eos_is_pooled_as_trained(tmp_path: Path, openrlhf: Any) -> None:
    folder, model, head = openrlhf
    # The same tensors as a SequenceClassification checkpoint: transformers reads before the closing EOS there.
    (tmp_path / "rm").mkdir()
    for file in (folder / "rm").iterdir():
        (tmp_path / "rm" / file.name).write_bytes(file.read_bytes())
    edit_json(
        tmp_path / "rm" / "config.json", remove=("value_head_prefix",), architectures=["LlamaForSequenceClassification"],
        id2label={"0": "LABEL_0"},
    )  # fmt: skip
    export(tmp_path / "rm", tmp_path / "bundle")
    text = "a closing EOS</s>"
    ids = make_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert ids[-1] == 2
    last, before = torch_reward(model, head, ids, -1), torch_reward(model, head, ids, -2)
    assert abs(last - before) > 0.1
    assert RewardModel.load(folder / "bundle", provider="cpu").score(text=text) == pytest.approx(last, abs=1e-5)
    assert RewardModel.load(tmp_path / "bundle", provider="cpu").score(text=text) == pytest.approx(before, abs=1e-5)


def test_trap_4_padding_has_no_side_and_positions_start_at_zero(openrlhf: Any) -> None:
    folder, model, head = openrlhf
    texts = [text for text in make_texts(8, longest=20, seed=4) if text]
    ids = [make_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(map(len, ids))
    left = torch.tensor([[2] * (width - len(each)) + each for each in ids])
    mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in ids])
    with torch.inference_mode():
        hidden = model(left, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).last_hidden_state
    expected = (hidden[:, -1] @ head.T)[:, 0].numpy()
    runtime = RewardModel.load(folder / "bundle", provider="cpu", padding=True)
    found = runtime.score_many([{"text": text} for text in texts])
    assert np.abs(found - expected).max() < 1e-4 * expected.std()


def test_trap_5_the_templates_bos_is_neither_doubled_nor_lost(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(adds_bos=True, template="{{ bos_token }}" + CHATML)
    write_sequence_classification(tmp_path / "rm", tokenizer=tokenizer)
    export(tmp_path / "rm", tmp_path / "bundle")
    runtime = RewardModel.load(tmp_path / "bundle", provider="cpu")
    rendered = tokenizer.apply_chat_template(HI, tokenize=False)
    assert tokenizer(rendered)["input_ids"][:2] == [1, 1]  # what a careless caller would score
    encoded = runtime.answers.encode([parse(HI), raw(rendered)])
    assert (
        encoded[0].ids.tolist() == encoded[1].ids.tolist() == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    )
    assert encoded[0].ids.tolist().count(1) == 1


def parse(messages: list[dict[str, str]]) -> Any:
    from rewardrt.text.rows import parse_row

    return parse_row({"messages": messages}).items[0]


def raw(text: str) -> Any:
    from rewardrt.text.rows import parse_row

    return parse_row({"text": text}).items[0]


def test_trap_6_the_closing_eos_is_there_whether_the_template_writes_it_or_not(openrlhf: Any) -> None:
    folder, *_ = openrlhf
    runtime = RewardModel.load(folder / "bundle", provider="cpu")
    ids = runtime.answers.encode([parse(HI)])[0].ids.tolist()
    tokenizer = make_tokenizer()
    expected = tokenizer.apply_chat_template(HI, tokenize=False).rstrip("\n") + " </s>"
    assert ids == tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert ids.count(2) == 1
    long = [HI[0], {"role": "assistant", "content": "word " * 2000}]
    cut = runtime.answers.encode([parse(long)])[0]
    assert (len(cut.ids), cut.ids[-1]) == (512, 2)  # the cut took the EOS away, the rule puts it back
    assert cut.truncated > 0


def test_trap_8_a_reward_depends_on_neither_its_batch_nor_the_stored_dtype(openrlhf: Any) -> None:
    folder, *_ = openrlhf
    runtime = RewardModel.load(folder / "bundle", provider="cpu")
    texts = [text for text in make_texts(16, longest=30, seed=8) if text]
    together = runtime.score_many([{"text": text} for text in texts])
    alone = np.array([runtime.score(text=text) for text in texts], dtype=np.float32)
    assert together.tobytes() == alone.tobytes()
    graph = ir.load(folder / "bundle" / "model.onnx").graph
    kinds = {value.dtype for value in graph.initializers.values()}
    assert kinds <= {ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL}


def test_trap_9_a_text_that_is_too_long_is_cut_on_the_right_and_says_so(openrlhf: Any) -> None:
    folder, *_ = openrlhf
    runtime = RewardModel.load(folder / "bundle", provider="cpu")
    text = " ".join(["word"] * 2000)
    whole = make_tokenizer()(text, add_special_tokens=False)["input_ids"]
    (result,) = runtime.score_rows([{"text": text}])
    assert (result.tokens, result.truncated) == (512, len(whole) - 512)
    with pytest.warns(match=r"1 of 1 texts were cut at 512 tokens \(item 0: \d+\)"):
        assert runtime.score(text=text) == result.reward
    assert runtime.answers.encode([raw(text)])[0].ids.tolist() == whole[:512]


def test_trap_10_the_graph_has_standard_operators_and_looks_for_no_id(openrlhf: Any) -> None:
    folder, *_ = openrlhf
    model = ir.load(folder / "bundle" / "model.onnx")
    nodes = list(model.graph.all_nodes())
    assert {node.domain for node in nodes} == {""}
    operators = {node.op_type for node in nodes}
    assert not operators & {"ArgMax", "NonZero", "Loop", "If", "Scan", "Equal"}
    assert {"Attention", "RMSNormalization", "RotaryEmbedding"} <= operators
    assert sum(node.op_type == "Attention" for node in nodes) == 2  # one a layer
    assert [value.name for value in model.graph.inputs][:2] == ["input_ids", "lengths"]
    assert [str(size) for size in model.graph.inputs[2].shape] == ["batch", "2", "past", "8"]
