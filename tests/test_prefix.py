"""Tokens that texts share are computed once, and it does not show in a single bit of a reward."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest

import zoo
from checkpoints import write_sequence_classification
from checkpoints_process import write_qwen_prm
from rewardrt import RewardModel
from rewardrt.graph.session import KeyValues
from rewardrt.scoring import prefix
from rewardrt.text.tokens import EncodedText
from rewardrt_export.pipeline import export


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> RewardModel:
    return RewardModel.load(tiny_bundle, provider="cpu")


@pytest.fixture(scope="module")
def steps_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prm")
    write_qwen_prm(folder)
    return export(folder, folder / "bundle").path


def test_every_attention_layer_has_its_own_past(tiny_bundle: Path) -> None:
    graph = onnx.load(tiny_bundle / "model.onnx", load_external_data=False).graph
    layers = [list(node.input[4:6]) for node in graph.node if node.op_type == "Attention"]
    assert layers == [[f"past_key.{layer}", f"past_value.{layer}"] for layer in range(4)]


def encoded(ids: Sequence[int]) -> EncodedText:
    return EncodedText(np.array(ids, dtype=np.int64), 0, np.array([len(ids) - 1], dtype=np.int64))


def awkward_texts(vocabulary: int) -> list[EncodedText]:
    """Texts whose shared and own parts have the lengths at which kernels change their ways."""
    rng = np.random.default_rng(0)
    base = rng.integers(5, vocabulary, 200).tolist()
    texts = []
    for shared in (0, 1, 2, 15, 16, 17, 31, 32, 33, 64, 127, 128, 129):
        for own in (1, 2, 3, 5, 16, 31, 32, 33):
            texts.append(encoded([*base[:shared], *rng.integers(5, vocabulary, own).tolist()]))
    return [*texts, encoded(base[:1]), encoded(base[:17]), encoded(base[:17]), encoded(base)]


def rewards(model: RewardModel, texts: Sequence[EncodedText]) -> list[float]:
    found = model.runner.run(texts)
    assert all(isinstance(value, np.ndarray) for value in found), found
    return [float(value[0]) for value in found]  # type: ignore[index]


@pytest.fixture(scope="module", params=["mamba2", "qwen3_next"])
def state_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mamba-2 alone, whose graph takes states and no keys; and a gated delta rule beside attention.

    `test_backbones` scores other kinds of layers alone and in chains.
    """
    folder = tmp_path_factory.mktemp("states")
    return zoo.Specimen(request.param, folder / "checkpoint").export(folder / "bundle", ("fp32",)).path


@pytest.mark.parametrize("chunk", [4, 7, 40, 10_000])
def test_sharing_and_parts_do_not_show_in_a_bit(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    check_sharing_and_parts(tiny_bundle, monkeypatch, chunk)


@pytest.mark.parametrize("chunk", [4, 40, 10_000])
def test_nor_do_they_with_layers_that_keep_a_state(
    state_bundle: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    check_sharing_and_parts(state_bundle, monkeypatch, chunk)


def check_sharing_and_parts(bundle: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(prefix, "CHUNK", 10_000)
    plain = RewardModel.load(bundle, provider="cpu", prefix_reuse=False)
    texts = awkward_texts(zoo.VOCABULARY)
    expected = [rewards(plain, [text])[0] for text in texts]
    assert plain.statistics.shared == 0
    assert len(set(expected)) >= len(texts) - 5  # the rewards tell the texts apart
    monkeypatch.setattr(prefix, "CHUNK", chunk)
    sizes = [1, 10, len(texts)]
    for cache, one in ((0, len(texts)), (1, 1), (64, 10)):
        model = RewardModel.load(bundle, provider="cpu", prefix_cache_mb=cache)
        # In parts of 4 tokens, which take fifty calls a text, each cache and each size once; else each with each.
        for seed, size in enumerate(sizes if chunk > 4 else [one]):
            order = np.random.default_rng(seed + 1).permutation(len(texts)).tolist()
            for start in range(0, len(order), size):
                part = order[start : start + size]
                assert rewards(model, [texts[index] for index in part]) == [expected[index] for index in part]
        assert model.statistics.shared > (0.5 if cache and chunk > 4 else 0.1)


def test_two_callers_at_once_get_the_bits_of_one(tiny_bundle: Path) -> None:
    texts = awkward_texts(400)
    expected = rewards(RewardModel.load(tiny_bundle, provider="cpu", prefix_reuse=False), texts)
    model = RewardModel.load(tiny_bundle, provider="cpu", prefix_cache_mb=1)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: rewards(model, texts), range(6)))
    assert found == [expected] * 6


def test_one_prompt_of_sixteen_answers_is_computed_once(model: RewardModel) -> None:
    prompt = list(range(5, 105))
    texts = [encoded([*prompt, 200 + answer, *range(9, 29)]) for answer in range(16)]
    before = model.statistics
    rewards(model, texts)
    assert model.statistics.given - before.given == 16 * 121
    assert model.statistics.computed - before.computed == 100 + 16 * 21


def test_so_is_one_with_layers_that_keep_a_state(state_bundle: Path) -> None:
    prompt = list(range(5, 105))
    texts = [encoded([*prompt, 200 + answer, *range(9, 29)]) for answer in range(16)]
    deeper = [encoded([*prompt, 199, *range(40, 70), 200 + answer, *range(9, 29)]) for answer in range(4)]
    model = RewardModel.load(state_bundle, provider="cpu")
    rewards(model, [*texts, *deeper])
    assert model.statistics.given == 16 * 121 + 4 * 152
    # The first of those that share more is computed from the prompt on, and stops where the others go on.
    assert model.statistics.computed == 100 + 16 * 21 + 31 + 4 * 21


def test_calls_end_where_a_state_is_wanted() -> None:
    text = encoded(list(range(1000)))
    assert prefix.state_stops(0, text, [600, 600, 100, 90, 0], 16) == [90, 600]  # 100 is too near to 90
    assert prefix.state_stops(590, text, [600, 700], 16) == [700]
    assert prefix.state_stops(0, text, [60, 2000], 80) == [998]  # two tokens are left
    assert prefix.state_stops(0, text, range(50, 1000, 50), 16) == list(range(600, 1000, 50))
    assert prefix.chunk_ends(0, text, [90, 600]) == [90, 345, 600, 800, 1000]
    early = EncodedText(np.arange(1000), 0, np.array([300, 999]))
    assert prefix.state_stops(0, early, [500], 16) == [300]


def test_positions_that_are_read_are_never_shared() -> None:
    text = EncodedText(np.arange(100), 0, np.array([40, 99]))
    assert prefix.legal_cut(90, text, prefix.MIN_SHARED) == 40
    assert prefix.legal_cut(30, text, prefix.MIN_SHARED) == 30
    assert prefix.legal_cut(100, encoded(list(range(100))), prefix.MIN_SHARED) == 98  # two tokens stay
    assert prefix.legal_cut(prefix.MIN_SHARED - 1, text, prefix.MIN_SHARED) == 0


@pytest.mark.parametrize("length", [1, 2, 256, 257, 258, 511, 512, 513, 8192])
def test_parts_are_of_equal_length_and_never_one_token(length: int) -> None:
    ends = prefix.chunk_ends(0, encoded(list(range(length))))
    sizes = np.diff([0, *ends])
    assert sizes.sum() == length
    assert sizes.max() <= prefix.CHUNK
    assert length == 1 or (sizes.min() >= 2 and sizes.max() - sizes.min() <= 1)


def values(tokens: int) -> KeyValues:
    return KeyValues((np.arange(tokens * 4, dtype=np.float32).reshape(1, 1, tokens, 4),))  # 16 bytes a token


def test_the_cache_keeps_within_its_budget_and_drops_the_least_recently_used() -> None:
    first, second, third = (list(range(start, start + 96)) for start in (0, 1000, 2000))
    cache = prefix.PrefixCache(2 * 96 * 16, prefix.MIN_SHARED)
    cache.keep(np.array(first), values(96))
    cache.keep(np.array(second), values(96))
    assert cache.nbytes == 2 * 96 * 16
    assert cache.find(encoded([*first, 7, 8]))[0] is not None
    cache.keep(np.array(third), values(96))
    assert cache.nbytes == 2 * 96 * 16
    assert cache.find(encoded([*second, 7, 8])) == (None, 0)
    found, known = cache.find(encoded([*first[:50], 7, 8]))
    assert found is not None and known == 48
    assert found.arrays[0].tobytes() == values(48).arrays[0].tobytes()  # whole blocks of 16


def test_a_text_over_the_budget_leaves_its_beginning() -> None:
    cache = prefix.PrefixCache(40 * 16, prefix.MIN_SHARED)
    cache.keep(np.arange(100), values(100))
    found, _ = cache.find(encoded(list(range(100))))
    assert (cache.nbytes, found and found.tokens) == (32 * 16, 32)


def test_a_beginning_that_texts_share_is_held_once() -> None:
    cache = prefix.PrefixCache(10_000, prefix.MIN_SHARED)
    cache.keep(np.arange(96), values(96))
    cache.keep(np.array([*range(64), *range(500, 532)]), values(96))
    assert cache.nbytes == (96 + 32) * 16


def test_prompts_behind_one_system_prompt_stay_in_the_cache_side_by_side(tiny_bundle: Path) -> None:
    model = RewardModel.load(tiny_bundle, provider="cpu", prefix_cache_mb=64)
    prompts = [[*range(5, 37), *range(start, start + 64)] for start in (100, 200)]  # 32 tokens, and 64 of their own
    for answer in range(8):
        for prompt in prompts:
            rewards(model, [encoded([*prompt, 300 + answer, *range(9, 24)])])
    assert model.statistics.given == 16 * 112
    assert model.statistics.computed == 112 + 80 + 14 * 16


def test_the_second_prompt_behind_a_system_prompt_stops_where_the_third_goes_on(state_bundle: Path) -> None:
    """A call leaves states where it ends; one that finds tokens without a state stops there for the next."""
    model = RewardModel.load(state_bundle, provider="cpu", prefix_cache_mb=64)
    prompts = [[*range(5, 37), *range(start, start + 64)] for start in (100, 200)]
    computed = []
    for answer in range(8):
        for prompt in prompts:
            before = model.statistics.computed
            rewards(model, [encoded([*prompt, 270 + answer, *range(9, 24)])])
            computed.append(model.statistics.computed - before)
    assert computed == [112, 112, 80, 80, *[16] * 12]


def state_values(tokens: int, *ends: int) -> KeyValues:
    return KeyValues(values(tokens).arrays, {end: (np.full((1, 4), end, np.float32),) for end in ends})


def test_a_beginning_ends_where_there_is_a_state() -> None:
    held = state_values(100, 40, 64, 100)
    assert held.first(100) is held
    for wanted, got in ((99, 64), (64, 64), (63, 40)):
        found = held.first(wanted)
        assert found is not None and found.tokens == got and max(found.states) == got
        assert found.arrays[0].tobytes() == values(got).arrays[0].tobytes()
    assert held.first(39) is None
    assert KeyValues((), held.states).tokens == 100  # of a model without attention
    assert held.bytes == 100 * 16 + 3 * 16


def test_the_cache_gives_what_ends_with_a_state_and_takes_one_that_comes_later() -> None:
    cache = prefix.PrefixCache(10_000, prefix.MIN_SHARED, with_states=True)
    text = encoded(list(range(96)))
    cache.keep(text.ids, state_values(96, 96))
    assert cache.find(encoded([*range(80), 7, 8])) == (None, 80)
    cache.keep(text.ids, state_values(96, 48, 96))
    found, known = cache.find(encoded([*range(80), 7, 8]))
    assert (found and (found.tokens, list(found.states)), known) == ((48, [48]), 80)
    assert cache.nbytes == 96 * 16 + 2 * 16


def test_a_process_model_shares_only_what_comes_before_its_first_step(steps_bundle: Path) -> None:
    plain = RewardModel.load(steps_bundle, provider="cpu", prefix_reuse=False)
    rng = np.random.default_rng(1)
    base = rng.integers(5, 60, 60).tolist()
    texts = [
        EncodedText(np.array([*base, *rng.integers(5, 60, 40)]), 0, np.array([70, 80 + extra, 99]))
        for extra in range(6)
    ]
    expected = [plain.runner.run([text])[0] for text in texts]
    model = RewardModel.load(steps_bundle, provider="cpu")
    found = model.runner.run(texts)
    assert [np.asarray(each).tobytes() for each in found] == [np.asarray(each).tobytes() for each in expected]
    assert model.statistics.shared > 0.4


def best_saving(texts: list[list[int]], worth: int) -> int:
    """The most tokens that groups can save, by trying every node of the tree of beginnings from the root down."""

    def below(members: list[list[int]], depth: int) -> int:
        if len(members) < 2:
            return 0
        children: dict[int, list[list[int]]] = {}
        for ids in members:
            if len(ids) > depth:
                children.setdefault(ids[depth], []).append(ids)
        inside = sum(below(child, depth + 1) for child in children.values())
        own = (len(members) - 1) * depth
        return max(inside, own if own >= worth else 0)

    # What may be shared of a text: at least two tokens are left, and a beginning under MIN_SHARED is not worth cutting.
    return below([ids[:-2] for ids in texts], 0)


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "least"), [(128, 16), (192, 80), (256, 80), (512, 80)])
def test_wide_heads_share_only_what_is_computed_in_the_same_steps(tmp_path: Path, head_dim: int, least: int) -> None:
    """Texts of 52 to 340 tokens that share 40 or 90: keys of more than 128 numbers are added up otherwise up to 64."""
    assert prefix.least_shared(head_dim) == least
    write_sequence_classification(tmp_path / "rm", "qwen3", head_dim=head_dim, num_hidden_layers=2)
    bundle = export(tmp_path / "rm", tmp_path / "bundle", certified=False)
    rng = np.random.default_rng(0)
    begin = rng.integers(6, 300, 90).tolist()
    texts = [
        encoded([*begin[:shared], *rng.integers(6, 300, more).tolist()])
        for shared, more in ((40, 12), (40, 13), (40, 60), (40, 120), (40, 300), (90, 5), (90, 100), (90, 200))
    ]
    alone = [RewardModel.load(bundle.path, provider="cpu").runner.run([text])[0] for text in texts]
    for megabytes in (0, 8):
        runner = RewardModel.load(bundle.path, provider="cpu", prefix_cache_mb=megabytes).runner
        for order in (texts, texts[::-1]):
            found = runner.run(order)
            expected = alone if order is texts else alone[::-1]
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        assert runner.statistics.shared > 0.1


@pytest.mark.parametrize("seed", range(20))
def test_groups_save_as_many_tokens_as_groups_can(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lists = [rng.integers(0, 2, rng.integers(2, 20)).tolist() for _ in range(rng.integers(1, 40))]
    lists += [[*lists[0], *[1] * count] for count in range(1, 8)]
    lists += [[1] * 10] * 3
    texts = [encoded(ids) for ids in lists]
    groups = prefix.plan_groups(texts, 12, 1)
    for group in groups:
        assert len({tuple(lists[index][: group.cut]) for index in group.indices}) == 1
        assert all(group.cut <= len(lists[index]) - 2 for index in group.indices)
        assert (len(group.indices) - 1) * group.cut >= 12
    members = [index for group in groups for index in group.indices]
    assert len(members) == len(set(members))
    assert sum((len(group.indices) - 1) * group.cut for group in groups) == best_saving(lists, 12)


def test_a_thousand_turns_each_going_on_from_the_last_are_planned() -> None:
    turns = [encoded([7] * length) for length in range(2, 1_200)]
    (group,) = prefix.plan_groups(turns, 4096, prefix.MIN_SHARED)
    assert (len(group.indices) - 1) * group.cut == max((1_197 - cut) * cut for cut in range(1_198))
    for some, worth in (([], 1), (turns[:1], 1), (turns[:20], 4096)):
        assert prefix.plan_groups(some, worth, prefix.MIN_SHARED) == []
    assert [prefix.group_worth(size) for size in (15 * 10**9, 269 * 10**6, 0)] == [1000, 55762, 15 * 10**12]
