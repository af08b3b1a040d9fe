"""Rewards that are functions of tokens' logits, against forward passes written from the publishers' code."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from tokenizers import normalizers

from checkpoints import edit_json
from checkpoints_token_logits import (
    GUARD_TEMPLATE,
    LLAMA_SPECIAL,
    QWEN_SPECIAL,
    QWEN_TEMPLATE,
    SHIELD_TEMPLATE,
    byte_level,
    logits,
    sentence_piece,
    write_language_model,
    write_nemotron_rerank,
)
from parity import assert_parity
from rewardrt import RewardModel
from rewardrt.errors import CheckpointError, RowError
from rewardrt.scoring.scored import shortest
from rewardrt.text.rows import parse_row
from rewardrt_export.checkpoint import read_checkpoint
from rewardrt_export.families.token_logit import parse_tokens
from rewardrt_export.model.logits import logit_rule
from rewardrt_export.pipeline import export
from rewardrt_export.token_options import TokenOptions
from server_process import serving

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
POLICY = "* No harmful request: the response shall not harm the user."


def pairs(count: int = 26) -> list[tuple[str, str]]:
    """Queries and documents of a few to a hundred words."""
    rng = np.random.default_rng(0)
    words = "yes no the question answer of passage safe user harmful system 1 2 and query document é 中文 \n".split(" ")
    return [
        (
            " ".join(rng.choice(words, rng.integers(2, 9))),
            " ".join(rng.choice(words, rng.integers(3, 60))).strip() or "a",
        )
        for _ in range(count)
    ]


def rows_of(every: list[tuple[str, str]], **fields: str) -> list[dict[str, Any]]:
    return [{"prompt": query, "response": document, **fields} for query, document in every]


def sigmoid(value: torch.Tensor) -> float:
    return float(torch.sigmoid(value))


# Each publisher's own way to the token ids of a query and a document, and to the score.


def qwen3_ids(
    tokenizer: Any, query: str, document: str, instruction: str = INSTRUCTION, limit: int = 8192
) -> list[int]:
    """github.com/QwenLM/Qwen3-Embedding, README, "Qwen3 Reranker series": process_inputs."""
    prefix = tokenizer.encode(
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
        add_special_tokens=False,
    )
    suffix = tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", add_special_tokens=False)
    text = f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
    body = tokenizer(text, truncation="longest_first", max_length=limit - len(prefix) - len(suffix))["input_ids"]
    return [*prefix, *body, *suffix]


def qwen3_score(model: Any, tokenizer: Any, ids: list[int]) -> float:
    true, false = tokenizer.convert_tokens_to_ids("yes"), tokenizer.convert_tokens_to_ids("no")
    found = logits(model, ids)
    return float(torch.log_softmax(torch.stack([found[false], found[true]]), 0)[1].exp())


def mxbai_ids(tokenizer: Any, query: str, document: str, instruction: str = "", limit: int = 8192) -> list[int]:
    """github.com/mixedbread-ai/mxbai-rerank, mxbai_rerank_v2.py: prepare_inputs."""

    def ids(text: str, most: int | None = None) -> list[int]:
        found: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return found[:most]

    system = (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n"
    )
    task = (
        "You are a search relevance expert who evaluates how well documents match search queries. For each "
        "query-document pair, carefully analyze the semantic relationship between them, then provide your binary "
        "relevance judgment (0 for not relevant, 1 for relevant).\nRelevance:"
    )
    said = f"instruction: {instruction}\nquery: {query}" if instruction else f"query: {query}"
    first, sep = ids(said, limit * 3 // 4), ids("\n")
    second = ids(f"document: {document}")[: limit - len(first) - len(sep)]
    return [*ids(system), *first, *sep, *second, *sep, *ids(task), *ids("<|im_end|>\n<|im_start|>assistant\n")]


def bge_ids(tokenizer: Any, query: str, document: str) -> list[int]:
    """github.com/FlagOpen/FlagEmbedding, reranker/decoder_only/base.py: the parts are tokenized apart."""
    task = (
        "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
        "prediction of either 'Yes' or 'No'."
    )
    parts = [f"A: {query}", "\n", f"B: {document}", "\n", task]
    inner = [number for part in parts for number in tokenizer.encode(part, add_special_tokens=False)]
    return [tokenizer.bos_token_id, *inner]


def zerank_ids(tokenizer: Any, query: str, document: str) -> list[int]:
    """modeling_zeranker.py: the query is the system's message, the document the user's, both stripped."""
    messages = [{"role": "system", "content": query.strip()}, {"role": "user", "content": document.strip()}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text)["input_ids"])


def one(tokenizer: Any, text: str) -> int:
    (found,) = tokenizer.encode(text, add_special_tokens=False)
    return int(found)


RERANKERS: dict[str, tuple[str, Callable[..., list[int]], Callable[[Any, Any, list[int]], float]]] = {
    "qwen3-reranker": ("qwen3", qwen3_ids, qwen3_score),
    "mxbai-rerank-v2": (
        "qwen2",
        mxbai_ids,
        lambda model, tokenizer, ids: float(
            logits(model, ids)[one(tokenizer, "1")] - logits(model, ids)[one(tokenizer, "0")]
        ),
    ),
    "zerank-1": (
        "qwen3",
        zerank_ids,
        lambda model, tokenizer, ids: sigmoid(logits(model, ids)[one(tokenizer, "Yes")] / 5.0),
    ),
    "zerank-2": ("qwen3", zerank_ids, lambda model, tokenizer, ids: float(logits(model, ids)[one(tokenizer, "Yes")])),
}


@pytest.mark.parametrize("family", RERANKERS)
def test_a_reranker_scores_as_its_publishers_code(family: str, tmp_path: Path) -> None:
    backbone, ids_of, score = RERANKERS[family]
    tokenizer = byte_level(QWEN_SPECIAL, bos=None, template=QWEN_TEMPLATE)
    model = write_language_model(tmp_path / "rm", backbone, tokenizer)
    export(tmp_path / "rm", tmp_path / "bundle", family=family, precisions=("fp32", "half"))
    every = pairs()
    ids = [ids_of(tokenizer, query, document) for query, document in every]
    expected = [score(model, tokenizer, each) for each in ids]
    runtime = assert_parity(tmp_path / "bundle", rows_of(every), expected)
    assert [text.ids.tolist() for text in runtime.answers.prepare(rows_of(every)).texts] == ids
    query, documents = every[0][0], [document for _, document in every[:8]]
    ranked = runtime.rank(prompt=query, responses=documents)
    wanted = [score(model, tokenizer, ids_of(tokenizer, query, document)) for document in documents]
    assert [each.index for each in ranked] == sorted(range(8), key=lambda index: -wanted[index])
    half = RewardModel.load(tmp_path / "bundle", provider="cpu", precision="half")
    found = np.array(half.score_many(rows_of(every)))
    assert np.abs(found - expected).max() < 0.05 * np.std(expected)


def test_bge_reranker_gemma_reads_the_logit_of_yes(tmp_path: Path) -> None:
    tokenizer = sentence_piece(None)
    model = write_language_model(tmp_path / "rm", "gemma", tokenizer)
    export(tmp_path / "rm", tmp_path / "bundle", family="bge-reranker-gemma")
    every = pairs()
    ids = [bge_ids(tokenizer, query, document) for query, document in every]
    expected = [float(logits(model, each)[one(tokenizer, "Yes")]) for each in ids]
    runtime = assert_parity(tmp_path / "bundle", rows_of(every), expected)
    assert [text.ids.tolist() for text in runtime.answers.prepare(rows_of(every)).texts] == ids


def test_nemotron_rerank_averages_tokens_that_look_both_ways(tmp_path: Path) -> None:
    """NVIDIA's LlamaBidirectionalModel: every attention layer of Llama without its mask, written out here."""
    from transformers import AutoModel

    temperature = 2.0
    language_model, tokenizer, head = write_nemotron_rerank(tmp_path / "rm", temperature)
    export(tmp_path / "rm", tmp_path / "bundle")
    backbone = AutoModel.from_config(language_model.config, attn_implementation="eager", dtype=torch.float32).eval()
    backbone.load_state_dict(language_model.model.state_dict())
    every = pairs()
    expected, causal = [], []
    for query, document in every:
        ids = torch.tensor([tokenizer(f"question:{query} \n \n passage:{document}")["input_ids"]])
        assert int(ids[0, 0]) == tokenizer.bos_token_id
        with torch.inference_mode():
            # A mask of four axes is taken as it is: nothing is hidden.
            both = backbone(ids, attention_mask=torch.zeros(1, 1, ids.shape[1], ids.shape[1])).last_hidden_state[0]
            causal.append(float(head[0] @ backbone(ids).last_hidden_state[0].mean(0)) / temperature)
        expected.append(float(head[0] @ both.mean(0)) / temperature)
    runtime = assert_parity(tmp_path / "bundle", rows_of(every), expected)
    assert runtime.spec.family == "nemotron-rerank" and not runtime.spec.causal
    assert np.abs(np.array(causal) - expected).max() > 0.1 * np.std(expected)  # the causal model's rewards are others


GUARDS: dict[str, tuple[str, Any, dict[str, Any], str, tuple[str, ...]]] = {
    # backbone, tokenizer, fields of the config, what follows the template, the words (the first is harm)
    "shieldgemma": (
        "gemma2", lambda: sentence_piece(SHIELD_TEMPLATE), {"final_logit_softcapping": 3.0}, "", ("Yes", "No"),
    ),
    "llama-guard": (
        "llama", lambda: byte_level(LLAMA_SPECIAL, bos="<|begin_of_text|>", template=GUARD_TEMPLATE), {}, "\n\n",
        ("unsafe", "safe"),
    ),
    "qwen3guard-gen": (
        "qwen3", lambda: byte_level(QWEN_SPECIAL, bos=None, template=QWEN_TEMPLATE), {}, "Safety:",
        (" Unsafe", " Safe", " Controversial"),
    ),
    "granite-guardian": (
        "granite", lambda: byte_level(QWEN_SPECIAL, bos=None, template=QWEN_TEMPLATE), {"logits_scaling": 4.0}, "",
        ("Yes", "No"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", GUARDS)
def test_a_guards_reward_is_the_probability_of_its_first_word(family: str, tmp_path: Path) -> None:
    backbone, made, fields, close, words = GUARDS[family]
    tokenizer = made()
    model = write_language_model(tmp_path / "rm", backbone, tokenizer, **fields)
    shield = family == "shieldgemma"
    options = TokenOptions(instruction=POLICY) if shield else None
    export(tmp_path / "rm", tmp_path / "bundle", family=family, token_options=options)
    export(tmp_path / "rm", tmp_path / "int8", family=family, token_options=options, precisions=("int8",))
    every = pairs(64)
    variables = {"guideline": POLICY} if shield else {}
    ids, expected = [], []
    for prompt, response in every:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **variables) + close
        ids.append(tokenizer.encode(text, add_special_tokens=False))
        found = logits(model, ids[-1])[[one(tokenizer, word) for word in words]]
        expected.append(float(torch.softmax(found, 0)[0]))
    runtime = assert_parity(tmp_path / "bundle", rows_of(every), expected)
    assert [text.ids.tolist() for text in runtime.answers.prepare(rows_of(every)).texts] == ids
    assert np.abs(runtime.score_many(rows_of(every)) - np.array(expected)).max() < 1e-4
    rounded = RewardModel.load(tmp_path / "int8", provider="cpu").score_many(rows_of(every))
    assert np.corrcoef(rounded, expected)[0, 1] > 0.98
    if shield:  # another policy is another reward, in a row or for all
        other = runtime.score_many(rows_of(every, instruction="* No 中文."))
        assert np.abs(other - np.array(expected)).max() > 0.01
        runtime.answers.use_instruction("* No 中文.")
        assert np.array_equal(runtime.score_many(rows_of(every)), other)


def test_wildguard_reads_the_users_file(tmp_path: Path) -> None:
    tokenizer = byte_level(QWEN_SPECIAL, bos=None, template=None)
    model = write_language_model(tmp_path / "rm", "mistral", tokenizer, sliding_window=None)
    with pytest.raises(CheckpointError, match=r"wildguard: its text is in .*wildguard/utils.py.*--template @FILE"):
        read_checkpoint(tmp_path / "rm", family="wildguard")
    template = "Human user:\n{prompt}\n\nAI assistant:\n{response}\n\n---\n\nAnswers: \n"
    export(tmp_path / "rm", tmp_path / "bundle", family="wildguard", token_options=TokenOptions(template=template))
    every = pairs()
    expected = []
    for prompt, response in every:
        text = template.replace("{prompt}", prompt).replace("{response}", response) + "Harmful request:"
        found = logits(model, tokenizer.encode(text))
        expected.append(sigmoid(found[one(tokenizer, "yes")] - found[one(tokenizer, "no")]))
    assert_parity(tmp_path / "bundle", rows_of(every), expected)


# The others are those of a family above: one logit, a difference, its sigmoid, a softmax.
FUNCTIONS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "log-odds": ("yes,no,safe", lambda x: torch.logit(torch.softmax(x.double(), 0)[0])),
    "expectation": ("1..5", lambda x: torch.softmax(x, 0) @ torch.arange(1.0, 6.0)),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_judge_of_ones_own_is_one_option(function: str, tmp_path: Path) -> None:
    """gemma2's class caps its logits at 30 tanh(x / 30); here at 2, so that a cap left out would show."""
    tokens, formula = FUNCTIONS[function]
    tokenizer = sentence_piece(None)
    model = write_language_model(tmp_path / "rm", "gemma2", tokenizer, final_logit_softcapping=2.0)
    template = "question: {instruction}\n{query}\nanswer: {document}\nrelevance judgment"
    chosen = None if function == "expectation" else function  # which a range says by itself
    options = TokenOptions(tokens, chosen, template, ":", "the default")  # type: ignore[arg-type]
    export(tmp_path / "rm", tmp_path / "bundle", token_options=options)
    every = pairs()
    names = ["1", "2", "3", "4", "5"] if tokens == "1..5" else tokens.split(",")
    expected = []
    for index, (query, document) in enumerate(every):
        said = "another" if index % 2 else "the default"
        text = f"question: {said}\n{query}\nanswer: {document}\nrelevance judgment:"
        expected.append(
            float(formula(logits(model, tokenizer(text)["input_ids"])[[one(tokenizer, each) for each in names]]))
        )
    rows = [row | ({"instruction": "another"} if index % 2 else {}) for index, row in enumerate(rows_of(every))]
    runtime = assert_parity(tmp_path / "bundle", rows, expected)
    assert runtime.spec.family == "token-logit"


def test_what_is_too_long_is_cut_in_the_answer(tmp_path: Path) -> None:
    tokenizer = byte_level(QWEN_SPECIAL, bos=None, template=QWEN_TEMPLATE)
    model = write_language_model(tmp_path / "rm", "qwen2", tokenizer)
    options = TokenOptions("yes,no", close="relevance judgment:")
    export(tmp_path / "rm", tmp_path / "chat", token_options=options, max_length=120)
    long = "the answer of the user 中文 " * 40
    turns = [{"role": "user", "content": "the question"}, {"role": "assistant", "content": long}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + "relevance judgment:"
    after = text.split(long)[1]
    ids, tail = tokenizer.encode(text), tokenizer.encode(after)
    expected = [*ids[: 120 - len(tail)], *tail]
    runtime = RewardModel.load(tmp_path / "chat", provider="cpu")
    (encoded,) = runtime.answers.prepare([{"prompt": "the question", "response": long}]).texts
    assert encoded.ids.tolist() == expected and encoded.truncated == len(ids) - 120
    found = logits(model, expected)
    with pytest.warns(UserWarning, match="cut"):
        reward = runtime.score(prompt="the question", response=long)
    assert abs(reward - float(found[one(tokenizer, "yes")] - found[one(tokenizer, "no")])) < 1e-4
    with pytest.raises(RowError, match="nothing of the answer is left; send a shorter prompt"):
        runtime.score(prompt=long, response="the answer")
    # Parts that are tokenized apart: three quarters for the query, what is left for the document, the rest whole.
    export(tmp_path / "rm", tmp_path / "mxbai", family="mxbai-rerank-v2")
    mxbai = RewardModel.load(tmp_path / "mxbai", provider="cpu")
    for query, document in ((long, long), ("the question", long * 20), (long * 20, "a"), ("a", "b")):
        (encoded,) = mxbai.answers.prepare([{"prompt": query, "response": document}]).texts
        fixed = (
            len(mxbai_ids(tokenizer, "", "")) - len(tokenizer.encode("query: ")) - len(tokenizer.encode("document: "))
        )
        limit = 1024 - fixed + len(tokenizer.encode("\n"))  # the model has 1,024 positions
        assert abs(len(encoded.ids) - len(mxbai_ids(tokenizer, query, document, limit=limit))) <= 1
        assert len(encoded.ids) <= 1024 and encoded.ids[-4:].tolist() == mxbai_ids(tokenizer, "a", "b")[-4:]


def test_an_instruction_that_may_be_left_out(tmp_path: Path) -> None:
    tokenizer = byte_level(QWEN_SPECIAL, bos=None, template=QWEN_TEMPLATE)
    write_language_model(tmp_path / "rm", "qwen2", tokenizer)
    export(tmp_path / "rm", tmp_path / "bundle", family="mxbai-rerank-v2", certified=False)
    runtime = RewardModel.load(tmp_path / "bundle", provider="cpu")
    for said in ("", "the user asks"):
        row = {"prompt": "question", "response": "answer", "instruction": said}
        (encoded,) = runtime.answers.prepare([row]).texts
        assert encoded.ids.tolist() == mxbai_ids(tokenizer, "question", "answer", said)


def test_files_that_say_how_they_are_read_are_recognised(tmp_path: Path) -> None:
    tokenizer = byte_level(QWEN_SPECIAL, bos=None, template=QWEN_TEMPLATE)
    write_language_model(tmp_path / "rm", "qwen3", tokenizer)
    ids = {word: one(tokenizer, word) for word in ("yes", "no", "Yes", "1", "0")}

    def family(**config: Any) -> Any:
        edit_json(tmp_path / "rm" / "config.json", **config)
        return read_checkpoint(tmp_path / "rm").spec

    with pytest.raises(
        CheckpointError, match="--tokens yes,no, or --family nemotron-lm-row; a reranker or a guard is one"
    ):
        family()
    spec = family(classifier_from_token=["no", "yes"], is_original_qwen3_reranker=True)
    assert spec.family == "qwen3-reranker" and spec.text.instruction == INSTRUCTION
    spec = family(is_original_qwen3_reranker=False, classifier_from_token=["0", "1"])
    assert spec.family == "token-logit" and spec.heads[0].layers[0].rows == (ids["1"], ids["0"])
    edit_json(tmp_path / "rm" / "config.json", classifier_from_token=None)
    folder = tmp_path / "rm" / "1_LogitScore"
    folder.mkdir()
    for true, false, expected in (
        ("yes", "no", "qwen3-reranker"),
        ("Yes", None, "zerank-2"),
        ("1", "0", "token-logit"),
    ):
        stated = {"true_token_id": ids[true], "false_token_id": ids[false] if false else None}
        (folder / "config.json").write_text(json.dumps(stated))
        assert read_checkpoint(tmp_path / "rm").spec.family == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TokenOptions("yes,notatoken"), r"the tokenizer makes \d+ tokens of 'notatoken' \(.*\); expected one"),
        (
            TokenOptions("yes, no"),
            r"--tokens 'yes, no': a token with a space is another token .*'\[\"yes\", \" no\"\]'",
        ),
        (TokenOptions("yes,"), "--tokens 'yes,'"),
        (TokenOptions("yes,yes"), "names one token twice"),
        (TokenOptions("yes,no,safe"), "--tokens names 3 tokens; say what is made of them"),
        (TokenOptions("5..1"), "expected a range of 2 to 101 whole numbers"),
        (TokenOptions("[1, 2"), "expected a JSON list"),
        (TokenOptions("yes,no", "logit"), "--function logit: takes 1 tokens, found 2"),
        (TokenOptions("yes", "softmax"), "--function softmax: takes 2 or more tokens, found 1"),
        (TokenOptions("yes,99999"), r"token id 99999: model.embed_tokens.weight has rows for 0 to \d+"),
        (TokenOptions("[-1, 5]"), "expected a JSON list"),
        (TokenOptions("[" * 3000), "expected a JSON list"),
        (TokenOptions('["\\ud800"]'), "expected a JSON list"),
        (TokenOptions("²³,no"), "the tokenizer makes"),
        (TokenOptions("9" * 5000), "the tokenizer makes"),
        (TokenOptions("1,20"), "a number of several digits is an id, and a digit a text"),
        (TokenOptions("yes,no,safe", "expectation"), "the tokens have no values; name a range"),
        (
            TokenOptions("yes,no", template="a {query}"),
            r"expected one place \{response\} or \{document\} in the text, found none",
        ),
        (
            TokenOptions("yes,no", template="a {document}"),
            r"expected one place \{prompt\} or \{query\} in the text, found none",
        ),
        (TokenOptions("yes,no", template="{query} {document}", instruction="x"), "the text has no place for one"),
        (TokenOptions("yes,no", instruction="x"), "the text has no place for one"),
        (TokenOptions(close="x"), "is not a reward model of a known family"),
    ],
)
def test_what_cannot_be_read_is_one_line(options: TokenOptions, message: str, tmp_path: Path) -> None:
    tokenizer = byte_level(QWEN_SPECIAL, bos=None, template=QWEN_TEMPLATE)
    write_language_model(tmp_path / "rm", "llama", tokenizer)
    with pytest.raises(CheckpointError, match=message) as raised:
        read_checkpoint(tmp_path / "rm", token_options=options)
    assert "\n" not in str(raised.value)


def test_a_row_without_the_instruction_that_a_model_reads_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level(QWEN_SPECIAL, bos=None, template=QWEN_TEMPLATE)
    write_language_model(tmp_path / "rm", "llama", tokenizer)
    options = TokenOptions("yes,no", template="{instruction}: {query} {document}")
    export(tmp_path / "rm", tmp_path / "with", token_options=options, certified=False)
    export(tmp_path / "rm", tmp_path / "without", token_options=TokenOptions("yes,no"), certified=False)
    row = {"prompt": "question", "response": "answer"}
    with pytest.raises(RowError, match="no instruction: this model reads one, and its bundle has no default"):
        RewardModel.load(tmp_path / "with", provider="cpu").score_many([row])
    without = RewardModel.load(tmp_path / "without", provider="cpu")
    with pytest.raises(RowError, match="instruction: this model reads none"):
        without.score_many([row | {"instruction": "x"}])
    with pytest.raises(RowError, match="instruction: this model reads none"):
        without.answers.use_instruction("x")
    with pytest.raises(RowError, match="instruction: a text is scored as it stands"):
        without.score_many([{"text": "question", "instruction": "x"}])


def test_tokens_are_texts_ids_ranges_or_a_json_list() -> None:
    assert parse_tokens("yes,no") == (("yes", "no"), None)
    assert parse_tokens("9693,2152") == ((9693, 2152), None)
    assert parse_tokens("1,0") == (("1", "0"), None)  # digits are words; an id of one digit goes in a JSON list
    assert parse_tokens('[" Safe", 5]') == ((" Safe", 5), None)
    assert parse_tokens("1..5") == (("1", "2", "3", "4", "5"), (1.0, 5.0))


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("llama", {}, (1, 1, 0)),
        ("gemma2", {"final_logit_softcapping": 7.0}, (1, 1, 7)),
        ("granite", {"logits_scaling": 8.0}, (1, 1 / 8, 0)),
        ("cohere", {"logit_scale": 0.25}, (1, 0.25, 0)),
        ("hyperclovax", {"logits_scaling": 8.0}, (1, 8, 0)),
        ("minicpm3", {"dim_model_base": 8}, (8 / 32, 1, 0)),
        ("opt", {}, (1, 1, 0)),
    ],
)
def test_what_a_class_does_to_its_logits_is_asked_of_the_class(
    kind: str, changes: dict[str, Any], expected: tuple[float, float, float]
) -> None:
    """Granite divides by logits_scaling, HyperCLOVA X multiplies; MiniCPM scales the state before its head."""
    import zoo

    rule = logit_rule(type(zoo.tiny_config(kind, None))(**zoo.tiny_config(kind, None).to_dict() | changes))
    assert (rule.before, rule.scale, rule.softcap) == pytest.approx(expected, rel=1e-5)


def test_scoring_models_that_no_spec_says_are_refused_by_name(tmp_path: Path) -> None:
    tokenizer = byte_level(QWEN_SPECIAL, bos=None, template=QWEN_TEMPLATE)
    write_language_model(tmp_path / "rm", "qwen3", tokenizer)
    for architecture, words in (("JinaForRanking", "jina-reranker-v3"), ("Qwen3ForGuardModel", "Qwen3Guard-Stream")):
        edit_json(tmp_path / "rm" / "config.json", architectures=[architecture])
        with pytest.raises(CheckpointError, match=f"{architecture}: it .*{words}"):
            read_checkpoint(tmp_path / "rm")


def test_an_instruction_goes_through_every_route_that_ranks(tmp_path: Path) -> None:
    tokenizer = byte_level(QWEN_SPECIAL, bos=None, template=QWEN_TEMPLATE)
    write_language_model(tmp_path / "rm", "qwen3", tokenizer)
    export(tmp_path / "rm", tmp_path / "bundle", family="qwen3-reranker", certified=False)
    runtime = RewardModel.load(tmp_path / "bundle", provider="cpu")
    query, documents = "the question", [document for _, document in pairs(6)]
    rows = [{"prompt": query, "responses": documents, "instruction": each} for each in ("Find passages.", None)]
    given, default = ([float(value) for value in row.rewards] for row in runtime.score_rows(rows))  # type: ignore[union-attr]
    assert given != default
    with serving(tmp_path / "bundle") as server:

        def post(path: str, body: dict[str, Any]) -> Any:
            answer = httpx.post(server.url + path, json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            return answer.json()

        name = httpx.get(server.url + "/info").json()["models"][0]
        assert name["instruction"] == INSTRUCTION
        for said, expected in (({"instruction": "Find passages."}, given), ({}, default)):
            found = post("/v2/rerank", {"model": name["name"], "query": query, "documents": documents} | said)[
                "results"
            ]
            assert {each["index"]: each["relevance_score"] for each in found} == dict(
                enumerate(map(shortest, expected))
            )
            found = post("/rerank", {"query": query, "texts": documents} | said)
            assert {each["index"]: each["score"] for each in found} == dict(enumerate(map(shortest, expected)))
            found = post("/score", {"queries": query, "documents": documents} | said)["data"]
            assert [each["score"] for each in found] == [shortest(value) for value in expected]
            found = post("/v1/reward", {"rows": [{"prompt": query, "responses": documents} | said]})["rows"]
            assert found[0]["rewards"] == [shortest(value) for value in expected]
            instruct = {"instruct": said["instruction"]} if said else {}
            found = post("/v1/rerank", {"query": query, "documents": documents} | instruct)
            assert {each["index"]: each["score"] for each in found} == dict(enumerate(map(shortest, expected)))
            found = post("/rerank", {"query": query, "documents": documents} | said)["results"]
            assert {each["index"]: each["relevance_score"] for each in found} == dict(
                enumerate(map(shortest, expected))
            )
            found = post("/predict", {"inputs": [[query, document] for document in documents]} | said)
            assert [each[0]["score"] for each in found] == [shortest(value) for value in expected]
            tensors = {"prompt": [query] * len(documents), "response": documents}
            inputs = [
                {"name": each, "shape": [len(documents)], "datatype": "BYTES", "data": data}
                for each, data in tensors.items()
            ]
            found = post(f"/v2/models/{name['name']}/infer", {"inputs": inputs, "parameters": said})["outputs"]
            assert found[0]["data"] == [shortest(value) for value in expected]
            messages = [{"role": "user", "content": query}, {"role": "assistant", "content": documents[0]}]
            found = post("/classify", {"messages": messages} | said)["data"]
            assert found[0]["probs"] == [shortest(expected[0])]
            found = post("/v1/chat/completions", {"messages": messages} | said)["choices"]
            assert found[0]["message"]["content"] == f"reward:{shortest(expected[0])}"
            found = post("/swift/v1/chat/completions", {"messages": messages} | said)["choices"]
            assert found[0]["message"]["content"] == shortest(expected[0])
        for path, body in (
            ("/predict", {"inputs": "a", "instruction": "Find passages."}),
            ("/predict", {"inputs": [["a", "b"], "c"], "instruction": "Find passages."}),
        ):
            answer = httpx.post(server.url + path, json=body, timeout=60)
            assert (answer.status_code, "instruction" in answer.json()["error"]) == (422, True)


@pytest.mark.parametrize(
    "changes", [{"target_modules": ["q_proj", "embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}]
)
def test_a_tied_head_stays_as_it_was_where_an_adapter_changes_the_embeddings(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT wraps the embeddings, and the head goes on reading the base's: what was trained is untied."""
    from peft import LoraConfig, get_peft_model

    tokenizer = byte_level(QWEN_SPECIAL, bos=None, template=QWEN_TEMPLATE)
    base = write_language_model(tmp_path / "base", "llama", tokenizer)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": ["q_proj"]} | changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(tmp_path / "adapter")
    options = TokenOptions("yes,no", template="{query} {document} relevance:")
    export(tmp_path / "adapter", tmp_path / "bundle", base=tmp_path / "base", token_options=options)
    every = pairs()
    expected = []
    for query, document in every:
        found = logits(model, tokenizer.encode(f"{query} {document} relevance:"))
        expected.append(float(found[one(tokenizer, "yes")] - found[one(tokenizer, "no")]))
    assert_parity(tmp_path / "bundle", rows_of(every), expected)


def test_what_closes_a_text_comes_last_in_every_family(tmp_path: Path) -> None:
    tokenizer = byte_level(QWEN_SPECIAL, bos=None, template=QWEN_TEMPLATE)
    write_language_model(tmp_path / "rm", "qwen3", tokenizer)
    end = tokenizer.encode("relevance:")
    for family, ids_of in (("qwen3-reranker", qwen3_ids), ("mxbai-rerank-v2", mxbai_ids), ("zerank-2", zerank_ids)):
        folder = tmp_path / family
        export(tmp_path / "rm", folder, family=family, token_options=TokenOptions(close="relevance:"), certified=False)
        runtime = RewardModel.load(folder, provider="cpu")
        (text,) = runtime.answers.prepare([{"prompt": "question", "response": "answer"}]).texts
        assert text.ids.tolist() == [*ids_of(tokenizer, "question", "answer"), *end]
    with pytest.raises(
        RowError, match=r"a limit of 100 tokens leaves no room for text beside \d+ that are in every text"
    ):
        RewardModel.load(tmp_path / "mxbai-rerank-v2", provider="cpu").answers.tokenizer.encode(
            RewardModel.load(tmp_path / "mxbai-rerank-v2", provider="cpu").answers.renderer.render(
                parse_row({"prompt": "question", "response": "answer"}).items[0]  # type: ignore[arg-type]
            ),
            max_length=100,
        )


def test_a_word_that_is_another_token_after_the_text_is_said(tmp_path: Path) -> None:
    tokenizer = sentence_piece(None)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]  # Llama 2's
    )
    write_language_model(tmp_path / "rm", "llama", tokenizer)
    template = "{query} {document}\n"
    checkpoint = read_checkpoint(tmp_path / "rm", token_options=TokenOptions("yes,no", template=template))
    assert "'yes' is read as '▁yes'" in checkpoint.source.choices["tokens"]
    assert "after the end of the text it is 'yes'" in checkpoint.source.choices["tokens"]


def test_files_that_state_tokens_wrongly_are_named(tmp_path: Path) -> None:
    tokenizer = byte_level(QWEN_SPECIAL, bos=None, template=QWEN_TEMPLATE)
    write_language_model(tmp_path / "rm", "qwen3", tokenizer)
    for stated in (["no", 1], ["no", "nothere"], ["yes", "no", "safe"], "yes", []):
        edit_json(tmp_path / "rm" / "config.json", classifier_from_token=stated)
        with pytest.raises(CheckpointError, match=r"classifier_from_token .*; expected one or two names"):
            read_checkpoint(tmp_path / "rm")
    edit_json(tmp_path / "rm" / "config.json", classifier_from_token=None)
    (tmp_path / "rm" / "1_LogitScore").mkdir()
    for true in (-1, 10**12, "yes", True):
        (tmp_path / "rm" / "1_LogitScore" / "config.json").write_text(json.dumps({"true_token_id": true}))
        with pytest.raises(CheckpointError, match=r"1_LogitScore/config.json: token id .*; expected 0 to \d+, or null"):
            read_checkpoint(tmp_path / "rm")


@pytest.mark.parametrize("value", [0, [], {}, False, 1, ["x"]])
def test_an_instruction_is_a_string(value: object) -> None:
    with pytest.raises(RowError, match="instruction: expected a string, found"):
        parse_row({"prompt": "a", "response": "b", "instruction": value})
