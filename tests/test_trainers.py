"""The reward functions of trainers, by small copies of the calls that each trainer makes.

Their own code runs in trainer_tests, in environments of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import logging
import multiprocessing
import pickle
import shutil
import sys
import threading
import types
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from commands import run
from rewardrt import BundleError, RewardClient, RewardModel, RewardRTError, RowError, ServerError, TruncationWarning
from rewardrt.cli.trainer import trainer
from rewardrt.trainers import areal, ms_swift, openrlhf, slime, trl, verifiers, verl
from rewardrt.trainers.listing import TRAINERS, find, printed
from rewardrt.trainers.reward import TrainerReward
from server_process import serving

BUNDLE = Path(__file__).parent / "bundles" / "version-1"
PROMPT = [{"role": "user", "content": "Why?"}]
ANSWER = [{"role": "assistant", "content": "so."}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
ODD = "\udc80"  # a lone surrogate, which no text has
NAMES = [each.name for each in TRAINERS]


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return RewardModel.load(BUNDLE)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(BUNDLE) as running:
        yield running.url


@pytest.fixture(params=["bundle", "server"])
def where(request: pytest.FixtureRequest) -> str:
    return str(BUNDLE) if request.param == "bundle" else str(request.getfixturevalue("url"))


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with a template that reads tools and calls of them."""
    folder = tmp_path_factory.mktemp("bundle") / "tools"
    shutil.copytree(BUNDLE, folder)
    template = (
        b"{% if tools %}{{ tools | tojson }}\n{% endif %}{% for message in messages %}<{{ message.role }}>"
        b"{{ message.content or '' }}{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}\n"
        b"{% endfor %}"
    )
    (folder / "chat_template.jinja").write_bytes(template)
    manifest = json.loads((folder / "reward.json").read_bytes())
    (record,) = [each for each in manifest["files"] if each["path"] == "chat_template.jinja"]
    record |= {"bytes": len(template), "sha256": hashlib.sha256(template).hexdigest()}
    (folder / "reward.json").write_text(json.dumps(manifest))
    return folder


def scored(model: RewardModel, *rows: dict[str, Any]) -> list[float]:
    return [float(reward) for reward in model.score_many(rows)]


def ask(reward: Any, **given: Any) -> Any:
    """Call a reward as its trainer does, whether it is a coroutine function or not."""
    found = reward(**given)
    return asyncio.run(found) if inspect.iscoroutine(found) else found


# TRL, trl/trainer/grpo_trainer.py, _calculate_rewards


def trl_call(reward: Any, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
    others = {"trainer_state": object(), "log_extra": print, "log_metric": print, "environments": [object()]}
    found = ask(
        reward, prompts=prompts, completions=completions, completion_ids=[[1]] * len(prompts), **columns, **others
    )
    assert isinstance(found, list) and len(found) == len(prompts)
    return found


@pytest.mark.parametrize("kind", [trl.Reward, trl.AsyncReward])
def test_trl_scores_strings_as_one_text_and_messages_by_the_template(kind: Any, where: str, model: RewardModel) -> None:
    reward = kind(where, name="kind")
    assert reward.__name__ == "kind"
    # The columns of templates mean nothing beside strings.
    found = trl_call(reward, ["good", ""], [" yes", "no"], answer=["1", None], tools=["a", "b"], messages=[1, 2])
    assert found == scored(model, {"text": "good yes"}, {"text": "no"})
    found = trl_call(reward, [PROMPT, PROMPT], [ANSWER, [{**ANSWER[0], "tool_calls": None}]], answer=[1, 2])
    assert found == scored(model, *[{"messages": PROMPT + ANSWER}] * 2)
    assert trl_call(reward, [], []) == []
    prefilled = [*PROMPT, {"role": "assistant", "content": "Well,"}]
    assert trl_call(reward, [prefilled], [ANSWER]) == scored(model, {"messages": prefilled + ANSWER})


def test_trl_leaves_out_what_cannot_be_scored(where: str, model: RewardModel, caplog: pytest.LogCaptureFixture) -> None:
    picture = [{"role": "user", "content": [{"type": "image", "image": object()}, {"type": "text", "text": "What?"}]}]
    prompts = ["good", "", PROMPT, PROMPT, picture, PROMPT, None]
    completions = [" yes", "", ANSWER, [{"role": "assistant", "content": None}], ANSWER, [], ANSWER]
    with caplog.at_level(logging.WARNING, "rewardrt"):
        found = trl_call(trl.Reward(where), prompts, completions)
    expected = scored(model, {"text": "good yes"}, {"messages": PROMPT + ANSWER})
    assert found == [expected[0], None, expected[1], None, None, None, None]
    assert [record.getMessage() for record in caplog.records] == [
        "5 of 7 texts have no reward; text 1: text: expected at least one character, found an empty string"
    ]
    assert trl_call(trl.Reward(where, failed=-1), ["a", ODD], ["b", ""])[1] == -1
    with pytest.raises(RowError, match=r"1 of 2 texts have no reward; text 1: .*`failed` is the reward"):
        trl_call(trl.Reward(where, failed="raise"), ["a", ODD], ["b", ""])


def test_trl_gives_the_columns_of_the_template_to_it(with_tools: Path) -> None:
    model = RewardModel.load(with_tools)
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    turns = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "weather", "content": "rain", "tool_call_id": None},
        *ANSWER,
    ]
    kept = [turns[0], {"role": "tool", "name": "weather", "content": "rain"}, *ANSWER]
    plain, tooled = scored(model, {"messages": PROMPT + kept}, {"messages": PROMPT + kept, "tools": TOOLS})
    assert plain != tooled
    prompts, completions = [PROMPT] * 3, [turns] * 3
    reward = trl.Reward(with_tools)
    assert trl_call(reward, prompts, completions) == [plain] * 3
    assert trl_call(reward, prompts, completions, tools=[TOOLS, json.dumps(TOOLS), None]) == [tooled, tooled, plain]
    arrays = np.array([None, TOOLS, TOOLS], dtype=object)
    assert trl_call(reward, prompts, completions, tools=arrays) == [plain, tooled, tooled]
    # A column that is something else is no reward, unless it is left out.
    for other in (["a", "b", "c"], ["{"] * 3, "abc", [[1]] * 3, TOOLS):
        assert trl_call(reward, prompts, completions, tools=other) == [None] * 3
        assert trl_call(trl.Reward(with_tools, columns=()), prompts, completions, tools=other) == [plain] * 3
    assert trl_call(reward, prompts, [turns[:2]] * 3) == [None] * 3  # ends with the tool


@pytest.mark.parametrize("name", ["image", "images", "video", "videos", "audios"])
def test_a_column_of_images_is_no_reward(name: str, where: str, model: RewardModel) -> None:
    found = trl_call(trl.Reward(where), [PROMPT] * 3, [ANSWER] * 3, **{name: [["picture.png"], [], None]})
    assert found == [None, *scored(model, {"messages": PROMPT + ANSWER}) * 2]


# OpenRLHF, openrlhf/utils/agent.py, _fetch_rewards_via_func


def test_openrlhf_calls_it_in_threads(where: str, model: RewardModel) -> None:
    reward, texts = openrlhf.Reward(where), [f"text {index}" for index in range(12)]

    async def fetch() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(reward, [text], ["p"], ["label"]) for text in texts))

    found, expected = asyncio.run(fetch()), scored(model, *({"text": text} for text in texts))
    for each, value in zip(found, expected, strict=True):
        assert each == {"rewards": [value], "scores": [value], "extra_logs": {"reward_model": [value]}}
    assert reward(texts, texts, texts)["rewards"] == expected  # as older versions call it
    assert reward([])["rewards"] == []
    with pytest.raises(RowError, match="expected a string, found int"):
        reward([1])


# verl, verl/trainer/ppo/reward.py and the managers


def test_verl_takes_the_prompt_from_extra_info(where: str, model: RewardModel) -> None:
    reward = verl.Reward(where)
    fixed = {"data_source": "d", "ground_truth": {"a": 1}, "reward_router_address": None}
    text, chat = scored(model, {"text": "goodso."}, {"messages": PROMPT + ANSWER})
    extra = {"num_turns": 2, "rollout_reward_scores": {}, "index": 3}
    assert reward(solution_str="so.", extra_info=extra | {"prompt": "good"}, **fixed) == text
    for prompt in (PROMPT, np.array(PROMPT, dtype=object), tuple(PROMPT)):
        assert reward(solution_str="so.", extra_info=extra | {"prompt": prompt}, **fixed) == chat
    assert reward(solution_str=np.str_("so."), extra_info={"prompt": np.str_("good")}, **fixed) == text
    named = verl.Reward(where, prompt_field="question", chat=True)
    assert named(solution_str="so.", extra_info={"question": "Why?", "prompt": "x"}, **fixed) == chat
    for wrong in ({}, None, {"prompt": ""}, {"prompt": []}, np.array([])):
        with pytest.raises(RowError, match=r"expected the prompt in extra_info\['prompt'\], found none"):
            reward(solution_str="so.", extra_info=wrong, **fixed)
    with pytest.raises(RowError, match="expected the messages to end before the answer"):
        reward(solution_str="so.", extra_info={"prompt": PROMPT + ANSWER}, **fixed)


def test_verl_finds_out_that_a_coroutine_function_is_one(where: str, model: RewardModel) -> None:
    function = verl.AsyncReward(where).compute_score
    assert inspect.iscoroutinefunction(function)
    assert not callable(verl.AsyncReward(where))  # which verl would take for a plain function
    found = asyncio.run(function("d", "so.", "", {"prompt": PROMPT}))
    assert [found] == scored(model, {"messages": PROMPT + ANSWER})


def test_verls_older_batches(where: str, model: RewardModel) -> None:
    extras = np.array([{"prompt": "good"}, {"prompt": PROMPT}], dtype=object)
    given = {"data_sources": np.array(["d", "d"]), "ground_truths": [None, None], "solution_strs": [" yes", "so."]}
    found = verl.BatchReward(where)(extra_infos=extras, **given)
    assert found == scored(model, {"text": "good yes"}, {"messages": PROMPT + ANSWER})
    assert verl.BatchReward(where, failed=0.0)(**given) == [0.0, 0.0]


# slime, slime/rollout/rm_hub/__init__.py: async_rm, batched_async_rm


def test_slime_awaits_a_sample_or_a_list_of_them(where: str, model: RewardModel) -> None:
    reward, arguments = slime.Reward(where, end="<|im_end|>"), SimpleNamespace(rm_type=None)
    samples = [
        SimpleNamespace(prompt="good", response=" yes<|im_end|>", label="1", metadata={"tools": ["unread"]}),
        SimpleNamespace(prompt=PROMPT, response="so.<|im_end|>", label=None, metadata=None),
    ]
    # A text is the policy's own, its end included; the bundle's template writes the end itself.
    expected = scored(model, {"text": "good yes<|im_end|>"}, {"messages": PROMPT + ANSWER})
    assert asyncio.run(reward(arguments, samples, evaluation=True)) == expected
    assert [asyncio.run(reward(arguments, sample)) for sample in samples] == expected
    assert asyncio.run(reward(arguments, [])) == []
    seen = SimpleNamespace(prompt=PROMPT, response="so.", label=None, metadata={}, multimodal_inputs={"images": [1]})
    with pytest.raises(RowError, match="images"):
        asyncio.run(reward(arguments, seen))


# ms-swift, swift/rl_core/grpo_algorithm.py, compute_rewards_per_func


@pytest.mark.parametrize("make", [ms_swift.orm, ms_swift.async_orm])
def test_ms_swift_makes_an_object_of_the_class(make: Any, where: str, model: RewardModel) -> None:
    made = make(where, name="mine", end="<|im_end|>")
    reward = made(args=object())
    assert type(reward).__name__ == reward.__name__ == "mine"
    assert asyncio.iscoroutinefunction(reward.__call__) == (make is ms_swift.async_orm)
    conversations = [
        [*PROMPT, {"role": "assistant", "content": "so.<|im_end|>"}],
        PROMPT + ANSWER + PROMPT + ANSWER,
        ANSWER,
        [],
        PROMPT + ANSWER,
    ]
    completions = [each[-1]["content"] if each else "" for each in conversations]
    columns = {"solution": ["1"] * 5, "images": [None] * 4 + [["picture.png"]], "trainer_state": object()}
    found = ask(reward, completions=completions, messages=conversations, **columns)
    assert found == [
        *scored(model, {"messages": PROMPT + ANSWER}, {"messages": PROMPT + ANSWER + PROMPT + ANSWER}), None, None, None
    ]  # fmt: skip
    assert ask(reward, completions=["a"]) == [None]


# AReaL, areal/api/reward_api.py, AsyncRewardWrapper.__call__


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("used", [True, False])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12's, of a fork beside threads
def test_areal_pickles_it_for_a_pool_of_processes(start: str, used: bool, where: str, model: RewardModel) -> None:
    reward = areal.Reward(where, end="<|im_end|>")
    samples = [
        (("good", " yes<|im_end|>", [1], [2]), {"answer": "1"}),
        (("<|im_start|>...", "so.<|im_end|>", [1], [2]), {"messages": PROMPT, "answer": "2"}),
    ]
    expected = scored(model, {"text": "good yes<|im_end|>"}, {"messages": PROMPT + ANSWER})
    if used:
        assert [reward(*given, **data) for given, data in samples] == expected
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(start)) as pool:
        assert [pool.submit(reward, *given, **data).result(60) for given, data in samples * 2] == expected * 2
        with pytest.raises(RowError, match="expected at least one character"):
            pool.submit(reward, "", "", [], []).result(60)


# verifiers, verifiers/v1/task.py, Task.score


class Dumped(SimpleNamespace):
    def model_dump(self, *, exclude_none: bool) -> dict[str, Any]:
        assert exclude_none
        return {name: value for name, value in vars(self).items() if value is not None}


def test_verifiers_awaits_it_with_a_trace(where: str, with_tools: Path, model: RewardModel) -> None:
    turns = [Dumped(**PROMPT[0]), Dumped(**ANSWER[0], tool_calls=None, provider_state=[{"id": 1}])]
    reward = verifiers.Reward(where)
    found = asyncio.run(reward(SimpleNamespace(messages=turns, tools=[])))
    assert [found] == scored(model, {"messages": PROMPT + ANSWER})
    with pytest.raises(RowError, match="expected at least one message"):
        asyncio.run(reward(SimpleNamespace(messages=[], tools=[])))
    calls = [{"id": "1", "type": "function", "name": "weather", "arguments": given} for given in ('{"a": 1}', "a=1")]
    turns[1:1] = [
        Dumped(role="assistant", content=None, tool_calls=calls),
        Dumped(role="tool", tool_call_id="1", content="rain", name=None),
    ]
    tools = [Dumped(type="function", name="weather", parameters={"type": "object"}, strict=None, native=1)]
    found = asyncio.run(verifiers.Reward(with_tools)(SimpleNamespace(messages=turns, tools=tools)))
    made = [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": given}}
        for given in ({"a": 1}, "a=1")
    ]
    row = [
        *PROMPT, {"role": "assistant", "tool_calls": made}, {"role": "tool", "tool_call_id": "1", "content": "rain"}, *ANSWER
    ]  # fmt: skip
    assert [found] == scored(RewardModel.load(with_tools), {"messages": row, "tools": TOOLS})


# What all have


def test_options_are_those_of_scoring(where: str, model: RewardModel) -> None:
    long = "many words " * 400
    raw, normalised = trl.Reward(where), trl.Reward(where, normalize=True)
    assert trl_call(normalised, ["a"], ["b"])[0] == model.score(text="ab", normalize=True)
    assert trl_call(raw, ["a"], ["b"])[0] == model.score(text="ab")
    with pytest.warns(TruncationWarning, match="texts were cut at 512 tokens"):
        found = trl_call(raw, [long], [long])
    with pytest.warns(TruncationWarning):
        assert found == scored(model, {"text": long + long})
    chat = trl.Reward(where, chat=True, end="<|im_end|>")
    assert trl_call(chat, ["Why?"], ["so.<|im_end|>"]) == scored(model, {"messages": PROMPT + ANSWER})
    assert trl_call(chat, [PROMPT], ["so.<|im_end|>"]) == scored(model, {"messages": PROMPT + ANSWER})


def test_the_bundle_may_be_named_by_its_hash(where: str, url: str, model: RewardModel) -> None:
    right = hashlib.sha256((BUNDLE / "reward.json").read_bytes()).hexdigest()
    assert trl_call(trl.Reward(where, expect_sha256=right), ["a"], ["b"]) == scored(model, {"text": "ab"})
    with pytest.raises(BundleError if where == str(BUNDLE) else ServerError, match=right):
        trl_call(trl.Reward(where, expect_sha256="0" * 64), ["a"], ["b"])
    with RewardClient(url, expect_sha256=right) as client:
        assert trl_call(trl.Reward(client), ["a"], ["b"]) == scored(model, {"text": "ab"})


def test_wrong_options_are_refused_before_the_training(url: str, model: RewardModel) -> None:
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (
            BUNDLE,
            {"failled": 0},
            "failled: not an option of a reward, nor of the RewardModel.load, which has batch_tokens",
        ),
        (url, {"provider": "cpu"}, "provider: not an option of a reward, nor of the RewardClient, which has api_key"),
        (model, {"threads": 1}, "threads: not an option of a reward, nor of the RewardModel that is there already"),
        (model, {"expect_sha256": "0"}, "that is there already: give the options to it"),
        (BUNDLE, {"failed": "rise"}, "failed: expected \"raise\", a number or None, found 'rise'"),
        (BUNDLE, {"columns": ["tool"]}, r"columns: expected some of tools, documents, .* found \['tool'\]"),
    ]
    for where, options, said in wrong:
        with pytest.raises(RewardRTError, match=said):
            trl.Reward(where, **options)
    for kind in (verl.Reward, verl.BatchReward, openrlhf.Reward, verifiers.Reward):
        with pytest.raises(RewardRTError, match="failed=None: this trainer wants a number for every text"):
            kind(BUNDLE, failed=None)
    with pytest.raises(BundleError, match="nowhere"):
        trl_call(trl.Reward("nowhere"), ["a"], ["b"])


@pytest.mark.parametrize(
    ("kind", "said"), [("pairwise", "compares answers"), ("steps", "aggregate='min' or 'product' or 'last' or 'mean'")]
)
def test_a_model_that_has_no_reward_for_a_text_is_an_error_and_no_row_of_none(kind: Any, said: str) -> None:
    model = RewardModel.load(BUNDLE)
    model.spec = SimpleNamespace(input=kind)  # type: ignore[assignment]
    with pytest.raises(RewardRTError, match=said):
        trl_call(trl.Reward(model), ["a"], ["b"])


def test_a_server_that_is_gone_is_an_error_whatever_failed_is() -> None:
    with serving(BUNDLE) as running:
        rewards: list[Any] = [
            trl.Reward(running.url, failed=0.0, patience=0.3),
            trl.AsyncReward(running.url, patience=0.3),
        ]
        found = [trl_call(reward, ["a"], ["b"]) for reward in rewards]
        assert found[0] == found[1]
        running.stop()
        for reward in rewards:
            with pytest.raises(ServerError, match="no answer"):
                trl_call(reward, ["a"], ["b"])


def test_a_server_that_comes_back_is_asked_again(model: RewardModel) -> None:
    with serving(BUNDLE) as running:
        port, reward = int(running.url.rsplit(":", 1)[1]), trl.Reward(running.url, patience=60.0)
        expected = trl_call(reward, ["a"], ["b"])
        running.stop()
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(trl_call(reward, ["a"], ["b"])))
    thread.start()
    with serving(BUNDLE, port=port):
        thread.join(60)
    assert found == expected == scored(model, {"text": "ab"})


@pytest.mark.parametrize("source", ["bundle", "server", "model", "client"])
def test_a_reward_can_be_pickled_and_opens_a_bundle_once(source: str, url: str, model: RewardModel) -> None:
    where: Any = {"bundle": BUNDLE, "server": url, "model": model, "client": RewardClient(url)}[source]
    for reward in (
        trl.Reward(where, name="mine"),
        verl.Reward(where),
        areal.Reward(where, end=""),
        slime.Reward(where, end=""),
    ):
        again = pickle.loads(pickle.dumps(reward))
        assert again.__name__ == reward.__name__
        found = again.rewards([{"text": "ab"}])
        assert found == reward.rewards([{"text": "ab"}]) == scored(model, {"text": "ab"})
        if source in ("bundle", "server"):
            assert again.open() is reward.open()
    if source == "bundle":
        assert len(pickle.dumps(trl.Reward(where))) < 1000


def test_a_relative_folder_is_that_of_where_the_reward_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: RewardModel
) -> None:
    monkeypatch.chdir(BUNDLE.parent)
    reward = pickle.dumps(trl.Reward("version-1"))
    monkeypatch.chdir(tmp_path)
    assert trl_call(pickle.loads(reward), ["a"], ["b"]) == scored(model, {"text": "ab"})


# rewardrt trainer


def modules_of_trainers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    orms: dict[str, Any] = {}
    rewards = types.ModuleType("swift.rewards")
    rewards.orms = orms  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "swift", types.ModuleType("swift"))
    monkeypatch.setitem(sys.modules, "swift.rewards", rewards)
    return orms


@pytest.mark.parametrize("name", NAMES)
def test_what_is_printed_runs(
    name: str, where: str, model: RewardModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    orms, used = modules_of_trainers(monkeypatch), find(name)
    if name == "llama-factory" or (used.lines and where != str(BUNDLE)):
        text = printed(used, urls=["http://h:1"])
        assert "http://h:1" + used.route in text and len(text.splitlines()) <= 2
        return
    found: dict[str, Any] = {}
    text = printed(used, urls=[where]) if where != str(BUNDLE) else printed(used, bundle=where)
    exec(compile(text, "rewards.py", "exec"), found)
    assert used.use.splitlines()[0] in found["__doc__"]
    rewards = [value for value in found.values() if isinstance(value, TrainerReward)] or [orms["rewardrt"]()]
    assert rewards[0].rewards([{"text": "ab"}]) == scored(model, {"text": "ab"})


def test_a_folder_of_any_name_is_printed_so_that_python_reads_it() -> None:
    for name in ('/a "b"/c', "/a\\b", "/\U0001f600/é", "/{where}", "/'"):
        found: dict[str, Any] = {}
        exec(printed(find("trl"), bundle=name), found)
        assert found["reward"]._where == name


def test_the_command_prints_the_same() -> None:
    done = run("trainer", "MS_SWIFT", "--bundle", BUNDLE)
    assert (done.returncode, done.stdout, done.stderr) == (0, printed(find("ms-swift"), bundle=str(BUNDLE)), "")
    done = run("trainer", "slime", "--url", "http://127.0.0.1:5000/")
    assert done.stdout == "--rm-type remote_rm --rm-url http://127.0.0.1:5000/remote_rm\n"
    done = run("trainer")
    assert [line.split()[0] for line in done.stdout.splitlines()] == NAMES


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trlx", "--url", "http://a"], "'trlx': expected one of the trainers trl, verl, openrlhf"),
        (["trl"], "give --bundle BUNDLE, or --url of a server"),
        (["trl", "--bundle", str(BUNDLE), "--url", "http://a"], "give --bundle BUNDLE, or --url of a server"),
        (["trl", "--bundle", "/nowhere"], "/nowhere: expected a bundle folder, found nothing; `rewardrt export"),
        (["trl", "--url", "a:5000"], "'a:5000': expected a server's address"),
        (["slime", "--url", "http://a", "--url", "http://b"], "slime takes the address of one server, found 2"),
        (["llama-factory", "--bundle", str(BUNDLE)], "llama-factory takes rewards from a server only: run"),
    ],
)
def test_wrong_uses_of_the_command_are_errors_of_ours(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(trainer, arguments)
    found = str(done.exception) if isinstance(done.exception, RewardRTError) else done.output.splitlines()[-1]
    assert said in found
    assert "\n" not in found


def test_a_wrong_use_of_the_command_is_one_line() -> None:
    done = run("trainer", "trlx", "--url", "http://a")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_several_servers_are_given_to_those_that_take_them() -> None:
    urls = ["http://a:1", "http://b:2"]
    assert printed(find("openrlhf"), urls=urls) == "--reward.remote_url http://a:1/get_reward,http://b:2/get_reward\n"
    assert "Reward('http://a:1,http://b:2')" in printed(find("trl"), urls=urls)
