"""The protocols, by the clients that speak them: real ones where they are packages, else their calls written out."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from rewardrt import RewardModel, Scored
from rewardrt.scoring.answers import Prepared
from rewardrt.server.access import UNAUTHORIZED
from rewardrt.text.items import Conversation, RawText
from rewardrt.text.rows import Row
from server_process import Running, serving

QUERY = "How do I boil an egg?"
DOCUMENTS = ["Put it into boiling water for seven minutes.", "No.", "Ask somebody else, I am busy."]


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Running]:
    with serving(tiny_bundle, "--served-name", "m", "--api-key", "sesame") as running:
        yield running


@pytest.fixture(scope="module")
def offline(tiny_bundle: Path) -> RewardModel:
    return RewardModel.load(tiny_bundle)


@pytest.fixture(scope="module")
def rewards(offline: RewardModel) -> list[float]:
    """The offline rewards of the documents as answers to the query."""
    return short(offline.score_many([{"prompt": QUERY, "response": document} for document in DOCUMENTS]))


def short(values: Any) -> list[float]:
    """Return float32 values as the shortest decimals, as the server writes them."""
    return [float(str(value)) for value in np.asarray(values, dtype=np.float32)]


def with_special_tokens(offline: RewardModel, text: str) -> Scored:
    """Return the offline score of a text to which the tokenizer adds its special tokens."""
    items = (RawText(text, special_tokens=True),)
    (scored,) = offline.score_prepared(Prepared((Row("single", items),), tuple(offline.answers.encode(items))))
    assert isinstance(scored, Scored)
    return scored


def call(server: Running, path: str, body: object) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, headers={"authorization": "Bearer sesame"}, timeout=60)


def test_cohere_v1_ranks(server: Running, rewards: list[float]) -> None:
    import cohere

    with httpx.Client() as http:
        client = cohere.Client(api_key="sesame", base_url=server.url, httpx_client=http)
        found = client.rerank(model="m", query=QUERY, documents=DOCUMENTS, top_n=2, return_documents=True)
    order = sorted(range(3), key=lambda index: -rewards[index])[:2]
    assert [(each.index, each.relevance_score) for each in found.results] == [(i, rewards[i]) for i in order]
    assert found.results[0].document.text == DOCUMENTS[order[0]]
    assert found.meta.api_version.version == "1"


def test_cohere_v2_ranks_and_is_told_of_a_wrong_model(server: Running, rewards: list[float]) -> None:
    import cohere

    with httpx.Client() as http:
        client = cohere.ClientV2(api_key="sesame", base_url=server.url, httpx_client=http)
        found = client.rerank(model="m", query=QUERY, documents=DOCUMENTS)
        assert {each.index: each.relevance_score for each in found.results} == dict(enumerate(rewards))
        assert found.meta.billed_units.search_units == 1
        with pytest.raises(cohere.errors.NotFoundError) as refused:
            client.rerank(model="other", query=QUERY, documents=DOCUMENTS)
        assert refused.value.body["message"] == "model 'other' is not served here; expected m"
        wrong = cohere.ClientV2(api_key="wrong", base_url=server.url, httpx_client=http)
        with pytest.raises(cohere.errors.UnauthorizedError):
            wrong.rerank(model="m", query=QUERY, documents=DOCUMENTS)


@pytest.mark.parametrize("binary", [False, True])
def test_tritonclient_infers(server: Running, offline: RewardModel, binary: bool) -> None:
    http = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    headers = {"authorization": "Bearer sesame"}
    client = http.InferenceServerClient(server.url.removeprefix("http://"))
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("m", headers=headers)
    assert client.get_model_metadata("m", headers=headers)["outputs"][0]["name"] == "score"
    texts = ["one text", "zwei Wörter", "three more words"]
    tensor = http.InferInput("text", [3], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode() for text in texts], dtype=np.object_), binary_data=binary)
    outputs = [http.InferRequestedOutput(name, binary_data=binary) for name in ("score", "tokens")]
    found = client.infer("m", [tensor], outputs=outputs, headers=headers, request_id="7")
    expected = offline.score_many([{"text": text} for text in texts])
    assert found.as_numpy("score").astype(np.float32)[:, 0].tobytes() == expected.tobytes()
    assert found.as_numpy("tokens").shape == (3, 1)
    assert found.get_response()["id"] == "7"
    client.close()


def test_huggingface_hub_classifies(server: Running, offline: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import InferenceClient, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    client = InferenceClient(model=f"{server.url}/predict", token="sesame")
    found = client.text_classification("some text")  # of TEI's flat list it returns the first
    assert (found.label, found.score) == ("LABEL_0", short([with_special_tokens(offline, "some text").reward])[0])


def test_verl_reads_its_reward_from_vllm_and_from_sglang(server: Running, offline: RewardModel) -> None:
    """It strips the BOS that the template wrote, because these servers add it; a client that leaves it gets no two."""
    conversation = Conversation(QUERY, {"role": "assistant", "content": DOCUMENTS[0]})
    written = offline.answers.renderer.render(conversation).text
    bos = offline.spec.special_tokens["bos_token"]
    assert written.startswith(bos)
    expected = short([offline.score(prompt=QUERY, response=DOCUMENTS[0])])
    for text in (written.removeprefix(bos), written):
        vllm = call(server, "/classify", {"model": "m", "input": text, "use_activation": False}).json()
        assert [vllm["data"][-1]["probs"][-1]] == expected
        sglang = call(server, "/v1/embeddings", {"model": "m", "input": text}).json()
        assert [sglang["data"][-1]["embedding"][-1]] == expected
    as_sent = {"input": written, "add_special_tokens": False}
    assert call(server, "/classify", as_sent).json()["data"][0]["probs"] == expected


def test_vllm_classifies_texts_ids_and_conversations(server: Running, offline: RewardModel) -> None:
    ids = [[5, 6, 7, 8], [9, 10]]
    answer = call(server, "/classify", {"input": ids}).json()
    encoded = [offline.answers.tokenizer.encode_ids(each) for each in ids]
    expected = [values[0] for values in offline.runner.run(encoded)]
    assert [item["probs"] for item in answer["data"]] == [[value] for value in short(expected)]
    assert answer["usage"] == {
        "prompt_tokens": 6, "total_tokens": 6, "completion_tokens": 0, "prompt_tokens_details": None,
    }  # fmt: skip
    assert answer["data"][1] == {"index": 1, "label": "LABEL_0", "probs": short(expected)[1:], "num_classes": 1}
    messages = [{"role": "user", "content": QUERY}, {"role": "assistant", "content": DOCUMENTS[0]}]
    answer = call(server, "/classify", {"model": "m", "messages": messages}).json()
    assert answer["data"][0]["probs"] == short([offline.score(messages=messages)])


@pytest.mark.parametrize("field", ["use_activation", "activation"])
def test_a_sigmoid_is_applied_when_it_is_asked_for_by_either_name(
    server: Running, offline: RewardModel, field: str
) -> None:
    raw = with_special_tokens(offline, "some text").reward
    for wanted, expected in ((True, 1 / (1 + math.exp(-raw))), (False, raw)):
        answer = call(server, "/classify", {"input": ["some text"], field: wanted}).json()
        assert answer["data"][0]["probs"] == short([expected])


def test_vllm_cuts_at_truncate_prompt_tokens_and_says_so(server: Running, offline: RewardModel) -> None:
    answer = call(server, "/classify", {"input": "many words in a text", "truncate_prompt_tokens": 2}).json()
    assert answer["usage"]["prompt_tokens"] == 2
    whole = with_special_tokens(offline, "many words in a text").tokens
    assert answer["data"][0]["truncated"] == whole - 2


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_vllm_scores_one_to_many_and_one_to_one(server: Running, rewards: list[float], path: str) -> None:
    for body in (
        {"queries": QUERY, "documents": DOCUMENTS},
        {"text_1": [QUERY] * 3, "text_2": DOCUMENTS},
    ):
        answer = call(server, path, body).json()
        assert [item["score"] for item in answer["data"]] == rewards
    wrong = call(server, path, {"queries": [QUERY] * 2, "documents": DOCUMENTS})
    assert wrong.json()["error"] == {
        "message": "queries: expected 1 or 3, as many as documents; found 2",
        "type": "BadRequestError",
        "param": None,
        "code": 400,
    }


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_vllm_and_jina_rank(server: Running, rewards: list[float], path: str) -> None:
    documents = [DOCUMENTS[0], {"text": DOCUMENTS[1]}, DOCUMENTS[2]]
    answer = call(server, path, {"model": "m", "query": QUERY, "documents": documents, "top_n": 0}).json()
    assert [item["relevance_score"] for item in answer["results"]] == sorted(rewards, reverse=True)
    assert {item["index"]: item["document"]["text"] for item in answer["results"]} == dict(enumerate(DOCUMENTS))
    assert answer["usage"]["total_tokens"] > 0


@pytest.mark.parametrize("path", ["/v2/models/m/versions/1/infer", "/v2/models/m/infer"])
def test_tritonclient_sends_a_version_a_time_limit_a_priority_and_compressed_bodies(
    server: Running, offline: RewardModel, path: str
) -> None:
    http = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    client = http.InferenceServerClient(server.url.removeprefix("http://"))
    tensor = http.InferInput("text", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([b"one text"], dtype=np.object_), binary_data=True)
    found = client.infer(
        "m", [tensor], headers={"authorization": "Bearer sesame"}, timeout=10**6, priority=1,
        model_version="1" if "versions" in path else "",
        request_compression_algorithm="gzip", response_compression_algorithm="gzip",
    )  # fmt: skip
    assert found.as_numpy("score").astype(np.float32)[0, 0] == np.float32(offline.score(text="one text"))
    with pytest.raises(Exception, match="version '2' of the model is not served; expected 1"):
        client.infer("m", [tensor], headers={"authorization": "Bearer sesame"}, model_version="2")
    client.close()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/score", {"queries": QUERY, "documents": DOCUMENTS, "encoding_format": "float"}),
        ("/score", {"text_1": QUERY, "text_2": DOCUMENTS, "cache_salt": "x", "priority": 0, "user": "u"}),
        ("/v1/rerank", {"model": "m", "query": QUERY, "documents": [{"text": text, "title": "t", "n": 1} for text in DOCUMENTS], "rank_fields": ["text"], "max_chunks_per_doc": 10}),
        ("/v2/rerank", {"model": "m", "query": QUERY, "documents": DOCUMENTS, "rank_fields": None, "max_tokens_per_doc": 4096}),
        ("/v1/classify", {"model": "m", "messages": [{"role": "user", "content": QUERY}, {"role": "assistant", "content": DOCUMENTS[0]}], "cache_salt": "x", "chat_template": None}),
    ],
)  # fmt: skip
def test_what_clients_documentation_shows_is_scored(
    server: Running, rewards: list[float], path: str, body: dict[str, Any]
) -> None:
    answer = call(server, path, body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    if "rerank" in path:
        assert {each["index"]: each["relevance_score"] for each in found["results"]} == dict(enumerate(rewards))
        if "max_chunks_per_doc" in body:
            assert {"title": "t", "n": 1}.items() <= found["results"][0]["document"].items()
    else:
        scores = [item.get("score", item.get("probs", [None])[0]) for item in found["data"]]
        assert scores == rewards[: len(scores)]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/rerank", {"model": "m", "query": "q", "documents": [{"text": "d", "title": "t"}], "rank_fields": ["title"]}),
        ("/classify", {"input": "a", "chat_template_kwargs": {"a": 1}}),
        ("/classify", {"messages": [], "chat_template": "{{ messages }}"}),
        ("/score", {"queries": "q", "documents": ["d"], "encoding_format": "base64"}),
        ("/v2/models/m/infer", {"inputs": [], "parameters": {"sequence_id": 1}}),
    ],
)  # fmt: skip
def test_a_field_that_would_change_scores_is_refused_by_name(server: Running, path: str, body: dict[str, Any]) -> None:
    answer = call(server, path, body)
    name = next(name for name in ("rank_fields", "chat_template", "encoding_format", "parameters") if name in str(body))
    assert (answer.status_code, name in answer.text) == (400, True)


def test_a_rerank_client_brings_a_hosted_models_name_where_the_operator_gave_none(
    server: Running, tiny_bundle: Path
) -> None:
    body = {"model": "jina-reranker-v1-base-en", "query": QUERY, "documents": DOCUMENTS, "top_n": 3}
    assert call(server, "/v1/rerank", body).status_code == 404
    with serving(tiny_bundle) as unnamed:
        assert len(httpx.post(f"{unnamed.url}/v1/rerank", json=body).json()["results"]) == 3
        refused = httpx.post(f"{unnamed.url}/classify", json={"model": "jina-reranker-v1-base-en", "input": "a"})
        assert refused.status_code == 404


def test_one_model_is_described_as_openai_clients_ask(server: Running) -> None:
    headers = {"x-api-key": "sesame"}
    assert httpx.get(f"{server.url}/v1/models/m", headers=headers).json()["id"] == "m"
    assert httpx.get(f"{server.url}/v1/models/other", headers=headers).status_code == 404


def test_vllm_pools(server: Running, offline: RewardModel) -> None:
    answer = call(server, "/pooling", {"model": "m", "input": ["some text"], "task": "classify"}).json()
    assert answer["data"] == [
        {"index": 0, "object": "pooling", "data": short([with_special_tokens(offline, "some text").reward])}
    ]
    refused = call(server, "/pooling", {"input": ["some text"], "task": "token_classify"})
    assert refused.status_code == 400


def test_sglang_classifies_and_ranks(server: Running, offline: RewardModel, rewards: list[float]) -> None:
    answer = call(server, "/classify", {"model": "m", "text": ["some text"]}).json()
    tokens = with_special_tokens(offline, "some text").tokens
    reward = short([with_special_tokens(offline, "some text").reward])
    assert answer == [{"embedding": reward, "meta_info": {"prompt_tokens": tokens}}]
    ranked = call(server, "/v1/rerank", {"query": QUERY, "documents": DOCUMENTS, "top_n": None}).json()
    best = max(range(3), key=rewards.__getitem__)
    assert ranked[0] == {"score": rewards[best], "document": DOCUMENTS[best], "index": best}
    packed = call(server, "/v1/embeddings", {"input": ["some text"], "encoding_format": "base64"}).json()
    raw = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), dtype=np.float32)
    assert short(raw) == reward


def test_tei_predicts_texts_pairs_and_batches(server: Running, offline: RewardModel, rewards: list[float]) -> None:
    (text,) = short([with_special_tokens(offline, "some text").reward])

    def item(score: float) -> list[dict[str, Any]]:
        return [{"score": score, "label": "LABEL_0"}]

    assert call(server, "/predict", {"inputs": "some text"}).json() == item(text)
    assert call(server, "/predict", {"inputs": [QUERY, DOCUMENTS[0]]}).json() == item(rewards[0])
    batch = [["some text"], [QUERY, DOCUMENTS[1]]]
    assert call(server, "/predict", {"inputs": batch, "raw_scores": True}).json() == [item(text), item(rewards[1])]


def test_tei_ranks_with_a_sigmoid_only_when_asked(server: Running, rewards: list[float]) -> None:
    best = max(range(3), key=rewards.__getitem__)
    body = {"query": QUERY, "texts": DOCUMENTS}
    assert call(server, "/rerank", body).json()[0] == {"index": best, "score": rewards[best]}
    asked = call(server, "/rerank", body | {"raw_scores": False, "return_text": True}).json()[0]
    assert asked == {
        "index": best, "text": DOCUMENTS[best], "score": short([1 / (1 + math.exp(-rewards[best]))])[0],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("/predict", {"inputs": ""}, 400, {"error": "`inputs` cannot be empty", "error_type": "Empty"}),
        ("/predict", {"inputs": "a", "truncation_direction": "left"}, 422, {"error": 'truncation_direction: expected "right" or "Right", found "left"', "error_type": "Validation"}),
        ("/predict", {"inputs": "word " * 3000, "truncate": False}, 422, None),
        ("/v2/models/m/infer", {"inputs": []}, 400, {"error": "inputs: expected text or sentences, or prompt and response or tokens and sequence_lengths with as many elements each"}),
        ("/classify", {"input": "a", "softmax": False}, 400, None),
        ("/classify", {"input": [[99_999_999]]}, 400, None),
        ("/classify", {"text": "a", "return_logits": True}, 400, None),
        ("/v2/rerank", {"model": "m", "query": "q", "documents": ["d"], "max_tokens_per_doc": 4}, 400, None),
    ],
)  # fmt: skip
def test_what_would_change_scores_and_is_not_understood_is_refused(
    server: Running, path: str, body: object, status: int, error: object
) -> None:
    answer = call(server, path, body)
    assert answer.status_code == status
    if error is not None:
        assert answer.json() == error


def test_tei_tells_what_it_serves(server: Running) -> None:
    info = httpx.get(f"{server.url}/info", headers={"x-api-key": "sesame"}).json()
    assert (info["model_id"], info["model_dtype"], info["max_input_length"]) == ("m", "fp32", 2048)
    assert httpx.get(f"{server.url}/ping").content == b""


def test_every_path_refuses_a_wrong_key_in_its_own_words(server: Running) -> None:
    found = {path: httpx.post(server.url + path).json() for path in ("/classify", "/predict", "/v2/models/m/infer")}
    said = f"{UNAUTHORIZED}; none was sent"
    assert found == {
        "/classify": {"error": "Unauthorized"},  # in vLLM's words alone
        "/predict": {"error": said, "error_type": "Unauthorized"},
        "/v2/models/m/infer": {"error": said},
    }
    wrong = httpx.post(server.url + "/predict", headers={"x-api-key": "guess"}).json()
    assert wrong["error"] == f"{UNAUTHORIZED}; another one was sent"
    assert "error=\"Unauthorized: send this server's key as" in server.wait_for("another one was sent")
