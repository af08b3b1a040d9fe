"""half graphs: float16 where tensor cores multiply, float32 where numbers add up, and who gets them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from checkpoints import write_sequence_classification
from rewardrt import RewardModel, reward_model
from rewardrt.bundle import manifest as bundle
from rewardrt.bundle import opening
from rewardrt.bundle.certificate import Fidelity
from rewardrt.bundle.manifest import Bundle, Variant
from rewardrt.errors import InferenceError, ProviderError
from rewardrt.machine.processor import Processor
from rewardrt.machine.providers import Selection
from rewardrt_export.pipeline import export
from texts import make_conversations

TINY = Path(__file__).parent.parent / "models" / "tiny"
FLOAT16, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
ROWS = [{"messages": messages} for messages in make_conversations(24, longest=60)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """models/tiny in float32 and in half."""
    return export(TINY, tmp_path_factory.mktemp("half") / "bundle", precisions=("fp32", "half"))


def nodes(made: Bundle, kind: str) -> list[ir.Node]:
    return [node for node in ir.load(made.path / "model.half.onnx").graph if node.op_type == kind]


def types(values: Any) -> set[Any]:
    return {value.dtype for value in values if value is not None and value.dtype in (FLOAT, FLOAT16)}


def test_products_and_attention_are_float16_and_what_adds_up_is_float32(made: Bundle) -> None:
    for kind, dtype in {
        "MatMul": FLOAT16, "Attention": FLOAT16, "Add": FLOAT, "RMSNormalization": FLOAT, "RotaryEmbedding": FLOAT,
        "Gemm": FLOAT,  # the head's
    }.items():  # fmt: skip
        found = [types([*node.inputs, *node.outputs]) for node in nodes(made, kind)]
        found = [each for each in found if each]  # of an Add, the positions are integers
        assert found and all(each == {dtype} for each in found), kind


def test_keys_and_values_go_in_and_out_as_float16_and_rewards_as_float32(made: Bundle) -> None:
    graph = ir.load(made.path / "model.half.onnx").graph
    assert {value.dtype for value in graph.inputs if "past" in str(value.name)} == {FLOAT16}
    assert Counter((str(value.name).split("_")[0], value.dtype) for value in graph.outputs) == {
        ("rewards", FLOAT): 1,
        ("present", FLOAT16): 8,
    }


def test_the_weights_take_half_the_file_and_none_is_there_twice(made: Bundle) -> None:
    whole, small = (made.path / variant.data[0] for variant in made.manifest.variants)
    assert 0.5 <= small.stat().st_size / whole.stat().st_size < 0.51
    stored = ir.load(made.path / "model.half.onnx").graph.initializers.values()
    matrices = [value for value in stored if value.shape is not None and len(value.shape) == 2]
    assert {value.dtype for value in matrices if str(value.name).startswith("backbone.")} == {FLOAT16}
    # A norm reads the residual stream in float32, and is cast once for all the products that read it.
    readers = [{usage.node.op_type for usage in node.outputs[0].uses()} for node in nodes(made, "RMSNormalization")]
    assert readers == [{"Cast"}] * 8 + [{"Gemm"}]


def test_after_the_last_attention_only_the_tokens_that_heads_read_are_computed(made: Bundle) -> None:
    (pooled,) = (node for node in nodes(made, "GatherND") if "Attention" in ancestors(node.inputs[0], 3))
    behind = descendants(pooled)
    assert Counter(node.op_type for node in behind if node.op_type in ("MatMul", "RMSNormalization", "Gemm")) == {
        "MatMul": 4,  # of attention's output, gate, up and down
        "RMSNormalization": 2,
        "Gemm": 1,
    }


def ancestors(value: ir.Value | None, steps: int) -> set[str]:
    node = value.producer() if value is not None else None
    if node is None or steps == 0:
        return set()
    return {node.op_type}.union(*(ancestors(each, steps - 1) for each in node.inputs))


def descendants(node: ir.Node) -> set[ir.Node]:
    behind = {usage.node for output in node.outputs for usage in output.uses()}
    return behind.union(*(descendants(each) for each in behind))


def test_it_is_ten_times_nearer_to_float32_than_torch_bfloat16(made: Bundle) -> None:
    fidelity = made.certificate("half").fidelity  # type: ignore[union-attr]
    assert fidelity is not None and fidelity.pair_order_agreement == 1
    assert 1e-5 < fidelity.rms_std < 0.003 and fidelity.bf16_rms_std > 3 * fidelity.rms_std
    half, whole = (
        RewardModel.load(made.path, provider="cpu", precision=precision).score_many(ROWS)
        for precision in ("half", "fp32")
    )
    assert 0 < np.sqrt(np.mean((half - whole) ** 2)) < 0.003 * whole.std()


def test_a_prefix_is_reused_to_the_same_reward(made: Bundle) -> None:
    rows = [{"prompt": "a long question " * 20, "response": "an answer " * count} for count in range(1, 9)]
    apart, shared = (
        RewardModel.load(made.path, provider="cpu", precision="half", prefix_reuse=reuse) for reuse in (False, True)
    )
    expected = apart.score_many(rows)
    assert np.abs(shared.score_many(rows) - expected).max() < 0.003 * expected.std()
    assert shared.statistics.computed < shared.statistics.given / 3


@pytest.mark.parametrize("backbone", ["mixtral", "opt"])
def test_flattened_tokens_are_multiplied_in_float16_and_experts_are_chosen_in_float32(
    tmp_path: Path, backbone: str
) -> None:
    write_sequence_classification(tmp_path / "rm", backbone)
    made = export(tmp_path / "rm", tmp_path / "bundle", precisions=("half",))
    products = [types([*node.inputs[:2], *node.outputs]) for node in [*nodes(made, "MatMul"), *nodes(made, "Gemm")]]
    # opt: 2 layers of 6 products, and the head; mixtral: in each layer 4 products of attention, and 2 of each of 4 experts,
    # their choice, and what mixes them
    expected = {"opt": {FLOAT16: 12, FLOAT: 1}, "mixtral": {FLOAT16: 24, FLOAT: 5}}
    assert Counter(dtype for each in products for dtype in each) == expected[backbone]


def test_what_became_infinite_in_float16_is_an_error_that_says_so(
    made: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = RewardModel.load(made.path, provider="cpu", precision="half")
    monkeypatch.setattr(model.session, "run", lambda *_, **__: np.array([[np.nan]], np.float32))
    expected = r"the reward is \[nan\]; expected finite numbers; half has no numbers over 65504: score with fp32$"
    with pytest.raises(InferenceError, match=expected):
        model.score(text="a text")


def offered(made: Bundle, *precisions: str, rms: float) -> Bundle:
    """The bundle with these variants, made up, each certified with this rms."""
    variants = {
        "fp32": Variant("fp32", "a", ()),
        "int8": Variant("int8", "b", (), needs=("avx_vnni",)),
        "half": Variant("half", "c", (), made_for=("cuda", "tensorrt")),
    }
    certificates = [
        dataclasses.replace(made.manifest.certificates[0], precision=name, fidelity=Fidelity(20, rms, 1, 0.02, 1))
        for name in precisions
        if name != "fp32"
    ]
    manifest = dataclasses.replace(
        made.manifest, variants=tuple(variants[name] for name in precisions), certificates=tuple(certificates)
    )
    return dataclasses.replace(made, manifest=manifest)


@pytest.mark.parametrize(
    ("precisions", "rms", "chosen"),
    [
        (("fp32", "int8", "half"), 0.01, {"cpu": "int8", "cuda": "half", "tensorrt": "half"}),
        (("half", "int8", "fp32"), 0.01, {"cpu": "int8", "cuda": "half", "tensorrt": "half"}),
        (("fp32", "int8", "half"), 0.04, {"cpu": "fp32", "cuda": "fp32", "tensorrt": "half"}),
        (("half",), 0.04, {"cpu": "half", "cuda": "half"}),
        (("int8", "half"), 0.04, {"cpu": "int8", "cuda": "half"}),
    ],
)
def test_auto_takes_what_was_made_for_the_provider_where_the_certificate_allows(
    made: Bundle, monkeypatch: pytest.MonkeyPatch, precisions: Any, rms: float, chosen: dict[str, str]
) -> None:
    monkeypatch.setattr(bundle, "read_processor", lambda: Processor("A CPU", ("avx_vnni",), 2, 2, None))
    some = offered(made, *precisions, rms=rms)
    assert {provider: some.variant("auto", provider).precision for provider in chosen} == chosen


def test_int8_on_a_gpu_is_refused_and_half_on_a_cpu_is_not(made: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bundle, opening):
        monkeypatch.setattr(module, "read_processor", lambda: Processor("A CPU", ("avx_vnni",), 2, 2, None))
    monkeypatch.setattr(reward_model, "open_bundle", lambda path, check_hashes: offered(made, "int8", rms=0.01))
    monkeypatch.setattr(reward_model, "select_provider", lambda choice: Selection("cuda", None))
    with pytest.raises(ProviderError, match=r"the int8 graph is for CPUs; score with the provider 'cpu'$"):
        RewardModel.load(made.path, provider="auto")
    monkeypatch.undo()
    assert RewardModel.load(made.path, provider="cpu", precision="half").precision == "half"


def answers(prompts: int, each: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"{prompt} is a long question. " * 40,
            "response": f"The answer {answer} is short. " * (answer % 5 + 1),
        }
        for prompt in range(prompts)
        for answer in range(each)
    ]


@pytest.mark.filterwarnings("ignore::rewardrt.TruncationWarning")
def test_answers_to_one_prompt_are_a_batch_after_it_where_batches_are_padded(made: Bundle) -> None:
    rows = [*answers(2, 20), {"text": "alone"}]
    plain, grouped = (
        RewardModel.load(made.path, provider="cpu", precision="half", padding=True, prefix_reuse=reuse)
        for reuse in (False, True)
    )
    assert grouped.runner._group_worth == int(15e12 / (made.path / "model.half.onnx.data").stat().st_size)
    grouped.runner._group_worth = 4096  # as with 3.7 billion parameters
    expected = plain.score_many(rows)
    calls: list[tuple[int, int]] = []  # rows and tokens of the past
    run = grouped.session._run

    def counting(input_ids: Any, lengths: Any, positions: Any, type_ids: Any, past: Any, outputs: Any) -> Any:
        calls.append((len(input_ids), 0 if past is None else past.tokens))
        return run(input_ids, lengths, positions, type_ids, past, outputs)

    grouped.session._run = counting  # type: ignore[method-assign]
    assert np.abs(grouped.score_many(rows) - expected).max() < 1e-4 * expected.std()
    shared = {tokens for _, tokens in calls} - {0}
    assert [count for count, tokens in calls if tokens] == [20, 20] and min(shared) > 250
    assert sorted(count for count, tokens in calls if not tokens) == [1, 1, 1]  # both prompts, and the text alone
    assert plain.statistics.given == grouped.statistics.given == plain.statistics.computed
    assert grouped.statistics.computed < plain.statistics.computed / 5


@pytest.mark.filterwarnings("ignore::rewardrt.TruncationWarning")
@pytest.mark.parametrize("fails", ["the prompt", "the answers"])
def test_a_group_that_fails_is_computed_whole(made: Bundle, fails: str) -> None:
    rows = answers(1, 20)
    model = RewardModel.load(made.path, provider="cpu", precision="half", padding=True)
    model.runner._group_worth = 4096
    expected = model.score_many(rows)
    run = model.session._run

    def failing(input_ids: Any, lengths: Any, positions: Any, type_ids: Any, past: Any, outputs: Any) -> Any:
        if len(outputs) > 1 if fails == "the prompt" else past is not None:
            raise InferenceError("out of memory")
        return run(input_ids, lengths, positions, type_ids, past, outputs)

    model.session._run = failing  # type: ignore[method-assign]
    assert np.abs(model.score_many(rows) - expected).max() < 1e-4 * expected.std()


def test_a_graph_whose_past_has_a_row_for_each_text_computes_texts_whole(made: Bundle) -> None:
    whole = RewardModel.load(made.path, provider="cpu", precision="fp32", padding=True)
    assert not whole.session.shares_past
    whole.runner._group_worth = 4096
    whole.score_many(answers(1, 20))
    assert whole.statistics.computed == whole.statistics.given
