"""The routes that trainers call, by their clients' own contracts: which fields they send, and what they read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from rewardrt import RewardModel
from rewardrt.scoring.answers import Prepared
from rewardrt.server.access import UNAUTHORIZED
from rewardrt.server.openapi import document
from rewardrt.server.routes import ROUTES
from rewardrt.text.items import TokenIds
from rewardrt.text.rows import Row
from server_process import Running, serving
from texts import make_conversations, make_texts

TEXTS = make_texts(9, longest=40, seed=3)
MESSAGES = make_conversations(1)[0]
NEW = ("/remote_rm", "/v1/score/evaluation", "/v1/chat/completions", "/swift/v1/chat/completions")


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Running]:
    with serving(tiny_bundle, "--served-name", "reward_model", "--max-items", 16) as running:
        yield running


@pytest.fixture(scope="module")
def offline(tiny_bundle: Path) -> RewardModel:
    return RewardModel.load(tiny_bundle)


def post(server: Running, path: str, body: object) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


def as_bits(values: Any) -> list[int]:
    return np.array(values, dtype=np.float32).view(np.int32).ravel().tolist()


def rewards(offline: RewardModel, texts: list[str]) -> list[int]:
    return as_bits([row.answers[0].reward for row in offline.score_rows([{"text": text} for text in texts])])  # type: ignore[union-attr]


# slime: slime/rollout/rm_hub/__init__.py, remote_rm. Any status but a 2xx is tried again; the JSON is the reward.


def slime(server: Running, prompt: object, response: str, label: object) -> Any:
    answer = httpx.post(
        f"{server.url}/remote_rm", json={"prompt": prompt, "response": response, "label": label}, timeout=120
    )
    answer.raise_for_status()
    assert answer.headers["content-type"] == "application/json"  # else aiohttp's client does not read it
    return answer.json()


def test_slime_gets_the_offline_reward_of_prompt_and_response_as_sent(server: Running, offline: RewardModel) -> None:
    """With --apply-chat-template the prompt is the policy's text up to the answer, and the answer ends as it wrote it."""
    for text in TEXTS[:4]:
        for cut in (0, len(text) // 2, len(text)):
            found = slime(server, text[:cut], text[cut:], {"any": [1, None]})
            assert isinstance(found, float)
            assert as_bits([found]) == rewards(offline, [text])


def test_slime_sends_messages_without_a_template_and_the_bundle_has_one(server: Running, offline: RewardModel) -> None:
    for conversation in make_conversations(3, seed=5):
        *prompt, answer = conversation
        found = slime(server, prompt, answer["content"], "label")
        assert as_bits([found]) == as_bits([offline.score(messages=conversation)])
    found = slime(server, [{"role": "user", "content": "q"}], "", None)
    assert as_bits([found]) == as_bits([offline.score(prompt="q", response="")])


def test_slime_may_send_conversations_and_labels_longer_than_the_texts_of_a_request(
    server: Running, offline: RewardModel
) -> None:
    prompt = [{"role": ("user", "assistant")[index % 2], "content": "a"} for index in range(21)]
    found = slime(server, prompt, "b", list(range(1000)))
    assert as_bits([found]) == as_bits([offline.score(messages=[*prompt, {"role": "assistant", "content": "b"}])])


# LLaMA-Factory: llamafactory/train/ppo/ppo_utils.py, get_rewards_from_server, and llamafactory/api/protocol.py. The
# trainer's body names "model" whatever is served, and it reads "scores" of an answer of any status.


def llamafactory(server: Running, messages: list[str]) -> list[float]:
    body = {"model": "model", "messages": messages}
    answer = httpx.post(
        f"{server.url}/v1/score/evaluation", json=body, headers={"content-type": "application/json"}, timeout=None
    )
    found = json.loads(answer.text)["scores"]
    assert isinstance(found, list)
    return found


def test_llamafactorys_trainer_gets_the_offline_rewards_whatever_the_model_is_called(
    server: Running, offline: RewardModel, tiny_bundle: Path
) -> None:
    assert as_bits(llamafactory(server, TEXTS)) == rewards(offline, TEXTS)
    with serving("--bundle", f"first={tiny_bundle}", "--bundle", f"second={tiny_bundle}") as several:
        assert as_bits(llamafactory(several, TEXTS)) == rewards(offline, TEXTS)
        for name, status in (("model", 200), ("second", 200), ("third", 404)):
            answer = post(several, "/v1/score/evaluation", {"model": name, "messages": ["a"]})
            assert answer.status_code == status
        assert answer.json() == {"detail": "model 'third' is not served here; expected first, second"}


def test_llamafactorys_trainer_never_takes_an_error_for_rewards(server: Running) -> None:
    for messages in ([], [""], ["a"] * 17):
        with pytest.raises(KeyError, match="scores"):
            llamafactory(server, messages)


def test_llamafactorys_answer_is_cut_on_the_right_by_max_length(server: Running, offline: RewardModel) -> None:
    text = max(TEXTS, key=len)
    whole = post(server, "/v1/score/evaluation", {"model": "reward_model", "messages": [text]})
    cut = post(server, "/v1/score/evaluation", {"model": "reward_model", "messages": [text], "max_length": 5})
    assert whole.json().keys() == {"id", "object", "model", "scores"}
    assert whole.json()["id"].startswith("scoreval-")
    assert (whole.json()["object"], whole.json()["model"]) == ("score.evaluation", "reward_model")
    short, long = (offline.answers.prepare([{"text": text}], max_length=limit) for limit in (5, None))
    (encoded,), (uncut,) = short.texts, long.texts
    assert not isinstance(encoded, Exception)
    assert not isinstance(uncut, Exception)
    assert encoded.ids.tolist() == uncut.ids[:5].tolist()  # the left end, and no special token before it
    (row,) = offline.score_prepared(short)
    assert as_bits(cut.json()["scores"]) == as_bits([row.answers[0].reward])  # type: ignore[union-attr]
    assert cut.headers["x-rewardrt-truncated"] == "1"


# NeMo-Aligner: nemo_aligner/algorithms/reward_server.py has the tensors. Its scripts send `sentences` [n, 1] and its
# actors `tokens` and `sequence_lengths` (nemo_aligner/models/nlp/gpt/reward_critic_clients.py), both by PyTriton's client,
# which asks for every output of the model's configuration, as binary data.


def pytriton(server: Running, inputs: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Ask as ModelClient.infer_batch does."""
    http = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    from tritonclient.utils import np_to_triton_dtype

    client = http.InferenceServerClient(server.url.removeprefix("http://"))
    assert client.is_server_ready()
    assert client.is_server_live()
    assert client.is_model_ready("reward_model", "")
    config = client.get_model_config("reward_model", "")
    assert config["max_batch_size"] > 0  # it knows by this that there are batches
    assert config == client.get_model_config("reward_model", "1") | {"name": "reward_model"}
    assert {each["name"] for each in config["input"] if each["optional"]} >= inputs.keys()
    wrapped = []
    for name, values in inputs.items():
        wrapped.append(http.InferInput(name, values.shape, np_to_triton_dtype(values.dtype)))
        wrapped[-1].set_data_from_numpy(values)
    outputs = [http.InferRequestedOutput(each["name"]) for each in config["output"]]
    found = client.infer("reward_model", wrapped, outputs=outputs, request_id="0")
    client.close()
    return {each["name"]: found.as_numpy(each["name"]) for each in found.get_response()["outputs"]}


def test_nemo_aligners_sentences_get_the_offline_rewards(server: Running, offline: RewardModel) -> None:
    texts = [*TEXTS, "too long " * 2000]
    found = pytriton(server, {"sentences": np.char.encode(np.array(texts)[..., np.newaxis], "utf-8")})
    assert (found["rewards"].shape, found["rewards"].dtype) == ((10, 1), np.float32)
    assert as_bits(found["rewards"]) == as_bits(found["score"]) == rewards(offline, texts)
    assert found["exceeded"].ravel().tolist() == [False] * 9 + [True]
    assert (found["truncated"] > 0).tolist() == found["exceeded"].tolist()


def test_nemo_aligners_actor_sends_token_ids_and_how_many_count(server: Running, offline: RewardModel) -> None:
    ids = [[5, 6, 7, 8], [9, 10], [11]]
    padded = np.array([each + [0] * (4 - len(each)) for each in ids])
    found = pytriton(server, {"tokens": padded, "sequence_lengths": np.array([[4], [2], [1]])})
    rows = tuple(Row("single", (TokenIds(tuple(each)),)) for each in ids)
    texts = tuple(offline.answers.encode([row.items[0] for row in rows]))
    expected = offline.score_prepared(Prepared(rows, texts))
    assert as_bits(found["rewards"]) == as_bits([score.reward for score in expected])  # type: ignore[union-attr]
    assert found["tokens"].ravel().tolist() == [4, 2, 1]


def tensor(name: str, data: list[Any], shape: list[int] | None = None, datatype: str = "BYTES") -> dict[str, Any]:
    return {"name": name, "shape": shape or [len(data)], "datatype": datatype, "data": data}


def test_sentences_are_answered_by_rewards_and_text_by_score(server: Running, offline: RewardModel) -> None:
    for name, shape, output in (
        ("sentences", [9], "rewards"),
        ("sentences", [9, 1], "rewards"),
        ("text", [9], "score"),
    ):
        answer = post(server, "/v2/models/reward_model/infer", {"inputs": [tensor(name, TEXTS, shape)]})
        (found,) = answer.json()["outputs"]
        assert (found["name"], found["shape"], found["datatype"]) == (output, [9, 1], "FP32")
        assert as_bits(found["data"]) == rewards(offline, TEXTS)
    ids = [tensor("tokens", [[5, 6], [7, 0]], [2, 2], "INT64"), tensor("sequence_lengths", [2, 1], [2, 1], "INT64")]
    body = {"inputs": ids, "outputs": [{"name": "exceeded"}, {"name": "tokens"}]}
    found = post(server, "/v2/models/reward_model/infer", body).json()["outputs"]
    assert [each["data"] for each in found] == [[False, False], [2, 1]]
    assert post(server, "/v2/models/reward_model/infer", {"inputs": ids}).json()["outputs"][0]["name"] == "rewards"


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([tensor("sentences", ["a"]), tensor("text", ["a"])], "expected text or sentences, or prompt and response or tokens and sequence_lengths with as many elements each"),
        ([tensor("tokens", [1, 2], [1, 2], "INT64")], "expected text or sentences, or prompt and response or tokens and sequence_lengths with as many elements each"),
        ([tensor("tokens", [1, 2], [2], "INT64")], "tokens expected a shape of 2 extents, found 1"),
        ([tensor("sentences", [1, 2])], "sentences expected strings"),
        ([tensor("sentences", ["a"], None, "INT64")], "sentences expected the datatype BYTES, found INT64"),
        ([tensor("tokens", [1, 2], [2, 1], "INT64"), tensor("sequence_lengths", [1, 2], None, "INT64")], "sequence_lengths expected 1 to 1, as many as tokens has"),
        ([tensor("tokens", [1, 2], [2, 1], "INT64"), tensor("sequence_lengths", [1], None, "INT64")], "expected text or sentences, or prompt and response or tokens and sequence_lengths with as many elements each"),
        ([tensor("tokens", [1, 2], [2, 2**31], "INT64")], "tokens has shape [2, 2147483648] and 2 elements"),
        ([tensor("tokens", [1], [17, 1], "INT64")], "tokens has 17 elements; expected at most 16"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_go_together_are_refused(server: Running, inputs: list[Any], message: str) -> None:
    answer = post(server, "/v2/models/reward_model/infer", {"inputs": inputs})
    assert (answer.status_code, answer.json()) == (400, {"error": f"inputs: {message}"})


def test_binary_token_ids_have_eight_bytes_each(server: Running) -> None:
    head = json.dumps(
        {"inputs": [{"name": "tokens", "shape": [1, 2], "datatype": "INT64", "parameters": {"binary_data_size": 9}}]}
    ).encode()
    answer = httpx.post(
        f"{server.url}/v2/models/reward_model/infer",
        content=head + bytes(9),
        headers={"inference-header-content-length": str(len(head))},
    )
    assert (answer.status_code, answer.json()) == (400, {"error": "inputs: tokens expected 16 bytes, found 9"})


# NVIDIA NIM and ms-swift: an OpenAI chat completion. NIM's documentation splits the content at ":"; ms-swift's engines put
# the number of a regression head there (swift/template/base.py, decode_seq_cls), and its client takes an answer whose
# `object` is "error" for one (swift/infer_engine/infer_client.py).


def test_a_chat_completion_has_the_offline_reward_as_its_content(server: Running, offline: RewardModel) -> None:
    for conversation in make_conversations(4, seed=7):
        expected = as_bits([offline.score(messages=conversation)])
        body = {"model": "reward_model", "messages": conversation}
        answer = post(server, "/v1/chat/completions", body).json()
        content = answer["choices"][0]["message"]["content"]
        name, number = content.split(":")
        assert (name, as_bits([float(number)])) == ("reward", expected)
        assert number == str(np.float32(number))
        tokens = answer["usage"]["prompt_tokens"]
        assert answer["object"] == "chat.completion"
        assert (answer["usage"]["total_tokens"], answer["usage"]["completion_tokens"]) == (tokens, 0)
        answer = post(server, "/swift/v1/chat/completions", body).json()
        assert answer["choices"][0]["message"]["role"] == "assistant"
        assert as_bits([answer["choices"][0]["message"]["content"]]) == expected
    models = httpx.get(f"{server.url}/swift/v1/models").json()["data"]
    assert [each["id"] for each in models] == ["reward_model"]


def test_what_a_chat_client_says_of_writing_changes_no_reward(server: Running) -> None:
    plain = post(server, "/v1/chat/completions", {"messages": MESSAGES}).json()["choices"]
    said = {
        "temperature": 0.0, "top_p": 0.5, "top_k": 5, "max_tokens": 1, "max_completion_tokens": 1, "seed": 7, "user": "u", "stop": ["\n"],
        "presence_penalty": 1, "frequency_penalty": -1.5, "n": 1, "stream": False, "logprobs": False, "metadata": {"a": "b"},
    }  # fmt: skip
    assert post(server, "/v1/chat/completions", {"messages": MESSAGES} | said).json()["choices"] == plain


def test_what_a_chat_has_beside_its_messages_reaches_the_template(server: Running, offline: RewardModel) -> None:
    """The tiny model's template reads none of it, which is an error as it is offline."""
    given: list[dict[str, Any]] = [
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"documents": [{"text": "d"}]},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"instruction": "be kind"},
    ]
    for more in given:
        (expected,) = offline.score_rows([{"messages": MESSAGES} | more])
        answer = post(server, "/v1/chat/completions", {"messages": MESSAGES, "tool_choice": "auto"} | more)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == f"item 0: {expected}"


def test_the_name_of_a_hosted_model_will_do_where_the_operator_gave_none(server: Running, tiny_bundle: Path) -> None:
    bodies = {
        "/v1/chat/completions": {"model": "nvidia/llama-3.1-nemotron-70b-reward", "messages": MESSAGES},
        "/v1/score/evaluation": {"model": "gpt-3.5-turbo", "messages": ["a"]},
    }
    with serving(tiny_bundle) as unnamed:
        for path, body in bodies.items():
            assert post(server, path, body).status_code == 404
            assert post(unnamed, path, body).status_code == 200


# All of them.


def wrong(message: str, status: int = 400, kind: str = "BadRequestError") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("/remote_rm", {"prompt": "a", "response": "b", "metadata": {}}, 400, {"error": "metadata: not a field that is understood here; expected only prompt, response, label"}),
        ("/remote_rm", {"prompt": "a"}, 400, {"error": "response: expected this field, found none"}),
        ("/remote_rm", {"prompt": "", "response": ""}, 400, {"error": "item 0: text: expected at least one character, found an empty string"}),
        ("/remote_rm", {"prompt": [], "response": "a"}, 400, {"error": "prompt: expected at least one message, found an empty list"}),
        ("/remote_rm", {"prompt": MESSAGES, "response": "a"}, 400, {"error": f"prompt[{len(MESSAGES) - 1}].role: expected the messages to end before the answer that is scored, found 'assistant'"}),
        ("/v1/score/evaluation", {"model": "m", "messages": ["a"], "top_p": 1}, 422, {"detail": "top_p: not a field that is understood here; expected only model, messages, max_length"}),
        ("/v1/score/evaluation", {"model": "model", "messages": []}, 400, {"detail": "Invalid request: messages: expected at least one text, found none"}),
        ("/v1/score/evaluation", {"model": "model", "messages": ["a"] * 17}, 422, {"detail": "17 texts in one request; expected at most 16"}),
        ("/v1/score/evaluation", {"model": "model", "messages": MESSAGES}, 422, {"detail": "messages[0]: expected string, found object"}),
        ("/v1/score/evaluation", {"model": "model", "messages": ["a"], "max_length": 0}, 422, {"detail": "max_length: expected at least 1, found 0"}),
        ("/v1/chat/completions", {"messages": []}, 400, wrong("messages: expected at least one message, found an empty list")),
        ("/v1/chat/completions", {"messages": MESSAGES[:1]}, 400, wrong("messages[0].role: expected the conversation to end with 'assistant', found 'user'")),
        ("/v1/chat/completions", {"messages": MESSAGES, "n": 2}, 400, wrong("n: expected 1, found 2")),
        ("/v1/chat/completions", {"messages": MESSAGES, "stream": True}, 400, wrong("stream: expected false, found true")),
        ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True}, 400, wrong("logprobs: expected false, found true")),
        ("/v1/chat/completions", {"messages": MESSAGES, "model": "m"}, 404, wrong("model 'm' is not served here; expected reward_model", 404, "NotFoundError")),
        ("/swift/v1/chat/completions", {"messages": MESSAGES, "n": 2}, 400, {"object": "error", "message": "n: expected 1, found 2"}),
        ("/swift/v1/chat/completions", {"messages": MESSAGES, "model": "m"}, 404, {"object": "error", "message": "model 'm' is not served here; expected reward_model"}),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused_in_the_protocols_own_words(
    server: Running, path: str, body: object, status: int, error: object
) -> None:
    answer = post(server, path, body)
    assert (answer.status_code, answer.json()) == (status, error)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/swift/v1/chat/completions"])
@pytest.mark.parametrize(
    "field", ["logit_bias", "response_format", "top_logprobs", "functions", "images", "reasoning_effort"]
)
def test_a_field_of_a_chat_that_is_not_understood_is_refused_by_name(server: Running, path: str, field: str) -> None:
    answer = post(server, path, {"messages": MESSAGES, field: 1})
    assert answer.status_code == 400
    assert f"{field}: not a field that is understood here" in answer.text


def test_the_new_routes_want_the_key_and_are_in_the_document(tiny_bundle: Path) -> None:
    said = f"{UNAUTHORIZED}; none was sent"
    refusals: dict[str, Any] = {
        "/remote_rm": {"error": said},
        "/v1/score/evaluation": {"detail": said},
        "/v1/chat/completions": {"error": "Unauthorized"},
        "/swift/v1/chat/completions": {"object": "error", "message": said},
    }
    paths = document()["paths"]
    with serving(tiny_bundle, "--api-key", "sesame") as running:
        for path in NEW:
            answer = post(running, path, {})
            assert (answer.status_code, answer.json()) == (401, refusals[path])
            assert paths[path]["post"]["security"] == [{"bearer": []}, {"key": []}, {}]
        for path in ("/swift/v1/models", "/v2/models/tiny/config", "/v2/models/tiny/versions/1/config"):
            assert httpx.get(running.url + path).status_code == 401
            assert httpx.get(running.url + path, headers={"x-api-key": "sesame"}).status_code == 200
    assert {"get"} == set(paths["/swift/v1/models"]) == set(paths["/v2/models/{model}/config"])


def test_too_many_texts_are_told_from_wrong_ones_in_our_protocol_and_nowhere_else(server: Running) -> None:
    many = ["a"] * 17
    message = "17 texts in one request; expected at most 16"
    bodies = [{"rows": [{"text": "a"}] * 17}, {"rows": [{"prompt": "q", "responses": many}]}]
    for body in bodies:
        assert post(server, "/v1/reward", body).json() == {
            "error": {"message": message, "type": "too_many", "code": 400}
        }
    refused = post(server, "/v1/reward", {"rows": 1}).json()
    assert refused["error"]["type"] == "validation"
    values = post(server, "/v1/reward", {"rows": [{"text": "a", "kept": [[]] * 40_000}]}).json()["error"]
    assert (values["type"], "send fewer at a time" in values["message"]) == ("too_many", True)
    assert post(server, "/get_reward", {"query": many}).json() == {"error": message}
    answer = post(server, "/predict", {"inputs": [["a"]] * 17})
    assert (answer.status_code, answer.json()) == (422, {"error": message, "error_type": "Validation"})
    answer = post(server, "/v1/rerank", {"model": "reward_model", "query": "q", "documents": many})
    assert (answer.status_code, answer.json()) == (400, {"message": message} | wrong(message))


def test_every_protocol_says_what_it_does_with_each_kind_of_problem() -> None:
    """A status that a dialect names is that of a kind which there is."""
    from typing import get_args

    from rewardrt.server.call import COMMON_STATUS
    from rewardrt.server.problem import Kind, Problem

    kinds = get_args(Kind)
    assert set(COMMON_STATUS) == set(kinds)
    for route in ROUTES:
        for scoring in route.scorings:
            assert set(scoring.dialect.statuses) <= set(kinds)
            found = {kind: scoring.dialect.status(Problem(kind, "")) for kind in ("validation", "too_many")}
            assert found["validation"] == found["too_many"], scoring.dialect.name
