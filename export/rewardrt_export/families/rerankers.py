"""Rerankers that are language models: how each publisher formats query and document, and which logits are read.

Formats are those of the publishers' own code, named in `Recipe.source`. Where that code tokenizes the parts of a text
separately, so does the rule here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewardrt.bundle.spec import TextRule
from rewardrt.errors import CheckpointError
from rewardrt_export.families.draft import Draft, Family
from rewardrt_export.families.token_logit import Recipe, begin_ids, is_qwen3_reranker, is_zerank_2, logit_family
from rewardrt_export.token_options import LogitFunction, TokenOptions

if TYPE_CHECKING:
    from rewardrt_export.source.folder import Source

QWEN3_SYSTEM = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
QWEN3_END = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
QWEN3_BODY = "<Instruct>: {instruction}\n<Query>: {prompt}\n<Document>: {response}"
QWEN3_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"

MXBAI_SYSTEM = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n"
)
MXBAI_TASK = (
    "You are a search relevance expert who evaluates how well documents match search queries. For each query-document "
    "pair, carefully analyze the semantic relationship between them, then provide your binary relevance judgment "
    "(0 for not relevant, 1 for relevant).\nRelevance:"
)
MXBAI_END = "<|im_end|>\n<|im_start|>assistant\n"
MXBAI_LENGTH = 8192  # tokens of query, "\n" and document; at most three quarters of them for the query

BGE_TASK = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)
QUERY_SHARE = 0.75

ZERANK = "<|im_start|>system\n{prompt}<|im_end|>\n<|im_start|>user\n{response}<|im_end|>\n<|im_start|>assistant\n"
ZERANK_TEMPERATURE = 5.0


def _ids(source: Source, text: str) -> tuple[int, ...]:
    return tuple(source.tokenizer.encode(text, add_special_tokens=False))


def _qwen3(source: Source) -> Recipe:
    text = TextRule(
        "format",
        format=QWEN3_BODY,
        prepend_ids=_ids(source, QWEN3_SYSTEM),
        append_ids=_ids(source, QWEN3_END),
        instruction=QWEN3_INSTRUCTION,
        cut="answer",
    )
    return Recipe(("yes", "no"), "sigmoid", text, source="github.com/QwenLM/Qwen3-Embedding, README: Qwen3-Reranker")


def _mxbai(source: Source) -> Recipe:
    segments = (
        MXBAI_SYSTEM, "{instruction}query: {prompt}", "\n", "document: {response}", "\n", MXBAI_TASK, MXBAI_END
    )  # fmt: skip
    fixed = sum(len(_ids(source, segment)) for segment in segments if "{" not in segment)
    room = MXBAI_LENGTH - len(_ids(source, "\n"))
    text = TextRule(
        "segments",
        segments=segments,
        first_part=MXBAI_LENGTH * QUERY_SHARE / room,
        instruction_format="instruction: {instruction}\n",
    )
    said = "github.com/mixedbread-ai/mxbai-rerank, mxbai_rerank_v2.py"
    positions = getattr(source.config, "max_position_embeddings", None)
    longest = fixed + room if positions is None else min(fixed + room, positions)
    return Recipe(("1", "0"), "difference", text, max_length=longest, source=said)


def _bge_gemma(source: Source) -> Recipe:
    bos = source.tokenizer.bos_token
    begin = (str(bos),) if bos is not None and source.tokenizer.bos_token_id != source.tokenizer.pad_token_id else ()
    text = TextRule(
        "segments",
        segments=(*begin, "A: {prompt}", "\n", "B: {response}", "\n", BGE_TASK),
        first_part=QUERY_SHARE,
    )
    return Recipe(("Yes",), "logit", text, source="github.com/FlagOpen/FlagEmbedding, reranker/decoder_only/base.py")


def _zerank(source: Source, function: LogitFunction, temperature: float) -> Recipe:
    text = TextRule("format", format=ZERANK, strip_words=True, cut="answer")
    return Recipe(("Yes",), function, text, temperature, source="the checkpoint's modeling_zeranker.py")


def _nemotron(source: Source, options: TokenOptions) -> Draft:
    from rewardrt.bundle.spec import Head, Layer, Tap

    if options.given:
        raise CheckpointError(f"{options.given[0]}: this model has a head of its own; leave the option out")
    pooling = source.raw.get("pooling", "avg")
    if pooling not in ("avg", "cls", "last"):
        raise CheckpointError(f"config.json: pooling {pooling!r}; expected avg, cls or last")
    taps = {"avg": Tap("last", "mean"), "cls": Tap("last", "first"), "last": Tap()}
    scale = 1 / float(source.raw.get("temperature", 1.0))
    format = "question:{prompt} \n \n passage:{response}"
    return Draft(
        heads=(Head((Layer("score.weight"),), scale=scale),),
        causal=False,
        text=TextRule("format", format=format, prepend_ids=begin_ids(source, format), cut="answer"),
        taps=(taps[pooling],),
        reasons={
            "heads": "score, a linear layer without bias, over config.json's temperature",
            "text": "NVIDIA NeMo Retriever, nemotron_rerank_v2.py",
            "taps": f"config.json: pooling {pooling}, of a Llama whose tokens look both ways",
        },
    )


QWEN3_RERANKER = logit_family(
    "qwen3-reranker",
    "Qwen3-Reranker",
    ("Qwen/Qwen3-Reranker-0.6B", "Qwen/Qwen3-Reranker-8B"),
    _qwen3,
    lambda source: "its files read the logits of yes and no" if is_qwen3_reranker(source) else None,
    head="rows of the LM head for yes and no",
    eos="an empty think block; a long text is cut in the document, so the end stays",
    output="P(yes) against no, 0 to 1; --function difference for its log-odds. Takes an instruction",
    maths="r = sigmoid(l['yes'] - l['no'])",
)
MXBAI_RERANK = logit_family(
    "mxbai-rerank-v2",
    "mxbai-rerank-v2",
    ("mixedbread-ai/mxbai-rerank-base-v2", "mixedbread-ai/mxbai-rerank-large-v2"),
    _mxbai,
    head='rows of the LM head for "1" and "0". Only with --family',
    eos="the task and the start of the assistant's turn, each part tokenized by itself",
    output="raw difference. Takes an optional instruction",
    maths="r = l['1'] - l['0']",
)
BGE_RERANKER_GEMMA = logit_family(
    "bge-reranker-gemma",
    "bge-reranker-v2-gemma",
    ("BAAI/bge-reranker-v2-gemma",),
    _bge_gemma,
    head='row of the LM head for "Yes". Only with --family',
    eos="the task, each part tokenized by itself",
    output="raw logit",
    maths="r = l['Yes']",
)
ZERANK_1 = logit_family(
    "zerank-1",
    "zerank-1",
    ("zeroentropy/zerank-1", "zeroentropy/zerank-1-small"),
    lambda source: _zerank(source, "sigmoid", ZERANK_TEMPERATURE),
    head='row of the LM head for "Yes". Only with --family',
    eos="the start of the assistant's turn; the query is the system message, the document the user's",
    output="a probability, 0 to 1",
    maths="r = sigmoid(l['Yes'] / 5)",
)
ZERANK_2 = logit_family(
    "zerank-2",
    "zerank-2",
    ("zeroentropy/zerank-2",),
    lambda source: _zerank(source, "logit", 1.0),
    lambda source: f"1_LogitScore reads Yes alone ({source.config.model_type})" if is_zerank_2(source) else None,
    head='row of the LM head for "Yes"',
    eos="the start of the assistant's turn; the query is the system message, the document the user's",
    output="raw logit; zerank-1's function of it is sigmoid(r / 5)",
    maths="r = l['Yes']",
)
NEMOTRON_RERANK = Family(
    name="nemotron-rerank",
    title="Llama Nemotron rerank: a Llama with bidirectional attention",
    examples=("nvidia/llama-nemotron-rerank-1b-v2", "nvidia/llama-3.2-nv-rerankqa-1b-v2"),
    head="linear `score` without bias, divided by config.json's temperature",
    tap="mean over all tokens, or as config.json's pooling says",
    eos="none",
    output="raw logit",
    maths="r = W mean(h) / temperature",
    matches=lambda source: (
        f"its model_type is {source.raw['model_type']}" if source.raw.get("model_type") == "llama_bidirec" else None
    ),
    describe=lambda source: _nemotron(source, TokenOptions()),
    with_options=_nemotron,
)
RERANKERS = (QWEN3_RERANKER, MXBAI_RERANK, BGE_RERANKER_GEMMA, ZERANK_1, ZERANK_2, NEMOTRON_RERANK)
