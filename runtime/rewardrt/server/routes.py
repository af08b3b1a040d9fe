"""The table of routes and what they do; the server, its OpenAPI document and the tests use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rewardrt.server import chat, cohere, kserve, llamafactory, openrlhf, own, sglang, slime, tei, vllm
from rewardrt.server.call import Scoring

RELOAD = "/v1/reload"  # POST, without a body


@dataclass(frozen=True)
class ScoringRoute:
    """A path that takes POST, and what it does; `pick` chooses by the body if protocols share a path."""

    path: str
    scorings: tuple[Scoring, ...]
    summary: str
    pick: Callable[[Any], int] = lambda body: 0

    def choose(self, body: Any) -> Scoring:
        """Return the operation that this body asks for."""
        return self.scorings[self.pick(body) if isinstance(body, dict) else 0]


def _has(name: str) -> Callable[[Any], int]:
    """Return a function that chooses the second protocol if the body has this field."""
    return lambda body: int(name in body)


def _lacks(name: str) -> Callable[[Any], int]:
    """Return a function that chooses the second protocol if the body lacks this field."""
    return lambda body: int(name not in body)


ROUTES: tuple[ScoringRoute, ...] = (
    ScoringRoute("/v1/reward", (own.REWARD,), "Score rows as `rewardrt score` does."),
    ScoringRoute("/get_reward", (openrlhf.GET_REWARD,), "OpenRLHF's remote reward model."),
    ScoringRoute("/remote_rm", (slime.REMOTE_RM,), "slime's remote reward model."),
    ScoringRoute("/v1/score/evaluation", (llamafactory.SCORE_EVALUATION,), "LLaMA-Factory, also its PPO trainer."),
    ScoringRoute("/v1/chat/completions", (chat.NIM,), "NVIDIA NIM: the reward is the answer's text, `reward:1.23`."),
    ScoringRoute("/swift/v1/chat/completions", (chat.SWIFT,), "ms-swift: the reward is the answer's content, 1.23."),
    ScoringRoute("/classify", (vllm.CLASSIFY, sglang.CLASSIFY), "vLLM; SGLang with `text`.", _has("text")),
    ScoringRoute("/v1/classify", (vllm.CLASSIFY, sglang.CLASSIFY), "vLLM; SGLang with `text`.", _has("text")),
    ScoringRoute("/pooling", (vllm.POOLING,), "vLLM."),
    ScoringRoute("/score", (vllm.SCORE,), "vLLM."),
    ScoringRoute("/v1/score", (vllm.SCORE,), "vLLM."),
    ScoringRoute("/rerank", (vllm.RERANK, tei.RERANK), "vLLM; text-embeddings-inference with `texts`.", _has("texts")),
    ScoringRoute(
        "/v1/rerank", (sglang.RERANK, cohere.RERANK), "SGLang; Cohere, Jina, vLLM with `model`.", _has("model")
    ),
    ScoringRoute("/v2/rerank", (cohere.RERANK,), "Cohere, Jina, vLLM."),
    ScoringRoute("/v1/embeddings", (sglang.EMBEDDINGS,), "SGLang, as verl reads it: the reward is the embedding."),
    ScoringRoute("/predict", (tei.PREDICT,), "text-embeddings-inference."),
    ScoringRoute("/v2/models/{model}/infer", (kserve.INFER,), "KServe's Open Inference Protocol."),
    ScoringRoute("/v2/models/{model}/versions/{version}/infer", (kserve.INFER,), "KServe, with the version 1."),
)
