"""KServe's Open Inference Protocol, version 2, over HTTP: `/v2/models/{model}/infer`, with and without binary data
and a version.

The input `text` is scored as sent; `prompt` and `response` together are a conversation. Outputs are `score` [n, 1],
and when they are asked for `tokens` and `truncated` [n, 1].
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

from rewardrt.scoring.scored import shortest
from rewardrt.server.call import Call, Dialect, Incoming, Outcome, Reply, Scoring
from rewardrt.server.problem import Problem
from rewardrt.server.schema import BOOLEAN, INTEGER, STRING, array, body, only
from rewardrt.server.vocabulary import answers, single_rewards, texts

LENGTH_HEADER = "inference-header-content-length"
TENSORS = {"score": "FP32", "tokens": "INT64", "truncated": "INT64"}
VERSION = "1"
MAX_DIMENSIONS, MAX_EXTENT = 4, 2**31
BODY = body(
    {
        "inputs": array(
            body(
                {
                    "name": only("text", "prompt", "response"),
                    "shape": array(INTEGER | {"minimum": 0, "maximum": MAX_EXTENT}, maxItems=MAX_DIMENSIONS),
                    "datatype": only("BYTES"),
                },
                data=array({"anyOf": [STRING, array(STRING)]}),
                parameters=body(binary_data_size=INTEGER | {"minimum": 0}),
            ),
            maxItems=2,
        )
    },
    id=STRING,
    outputs=array(body({"name": only(*TENSORS)}, parameters=body(binary_data=BOOLEAN)), maxItems=len(TENSORS)),
    # What Triton's clients say of scheduling, which no score depends on.
    parameters=body(binary_data_output=BOOLEAN, priority=INTEGER, timeout=INTEGER),
)
ANSWER = {
    "type": "object",
    "properties": {"model_name": STRING, "id": STRING, "outputs": array({"type": "object"})},
    "required": ["model_name", "outputs"],
}


def refusal(status: int, problem: Problem) -> dict[str, Any]:
    """Return the body of a request that is not answered."""
    return {"error": problem.message}


def split(data: bytes, headers: Mapping[str, str]) -> tuple[bytes, bytes]:
    """Return the JSON of a body, and the binary data behind it."""
    size = headers.get(LENGTH_HEADER)
    if size is None:
        return data, b""
    if not (size.isascii() and size.isdigit() and len(size) < 20) or int(size) > len(data):
        raise Problem("validation", f"{LENGTH_HEADER}: expected at most the {len(data)} bytes of the body")
    return data[: int(size)], data[int(size) :]


def check_version(path: Mapping[str, str]) -> None:
    """Raise Problem for another version of a model than the one that there is."""
    if path.get("version", VERSION) != VERSION:
        raise Problem(
            "unknown_model", f"version {path['version'][:80]!r} of the model is not served; expected {VERSION}"
        )


def infer(incoming: Incoming) -> Call:
    """Score the texts of the tensors."""
    wanted = incoming.body
    served = incoming.models.choose(incoming.path["model"])
    check_version(incoming.path)
    single_rewards(served)
    tensors: dict[str, list[str]] = {}
    rest = incoming.binary
    for tensor in wanted["inputs"]:
        values, rest = _values(tensor, rest, served.options.max_items)
        if tensor["name"] in tensors:
            raise Problem("validation", f"inputs: {tensor['name']} is there twice")
        tensors[tensor["name"]] = values
    if rest:
        raise Problem("validation", f"body: {len(rest)} bytes of binary data belong to no input")
    if set(tensors) == {"text"}:
        rows = texts(served, tensors["text"])
    elif set(tensors) == {"prompt", "response"} and len(tensors["prompt"]) == len(tensors["response"]):
        rows = answers(served, list(zip(tensors["prompt"], tensors["response"], strict=True)))
    else:
        raise Problem("validation", "inputs: expected text, or prompt and response with as many elements each")
    outputs = wanted.get("outputs") or [{"name": "score"}]
    binary = bool((wanted.get("parameters") or {}).get("binary_data_output"))

    def render(outcome: Outcome) -> Any:
        scores = outcome.scores
        columns: dict[str, list[Any]] = {
            "score": [shortest(score.reward) for score in scores],
            "tokens": [score.tokens for score in scores],
            "truncated": [score.truncated for score in scores],
        }
        found, blobs = [], []
        for output in outputs:
            name = output["name"]
            tensor = {"name": name, "shape": [len(scores), 1], "datatype": TENSORS[name]}
            asked = (output.get("parameters") or {}).get("binary_data")
            if binary if asked is None else asked:
                kind = "f" if name == "score" else "q"
                blobs.append(struct.pack(f"<{len(scores)}{kind}", *columns[name]))
                found.append(tensor | {"parameters": {"binary_data_size": len(blobs[-1])}})
            else:
                found.append(tensor | {"data": columns[name]})
        answer = {"model_name": served.name, "model_version": VERSION, "outputs": found}
        if wanted.get("id") is not None:
            answer["id"] = wanted["id"]
        if not blobs:
            return answer
        head = json.dumps(answer).encode()
        headers = ((LENGTH_HEADER, str(len(head))),)
        return Reply(head + b"".join(blobs), "application/octet-stream", headers)

    return Call(served, rows, render)


def _values(tensor: dict[str, Any], rest: bytes, most: int) -> tuple[list[str], bytes]:
    """Return the strings of a tensor, at most so many, and the binary data that is left for the next."""
    name = tensor["name"]
    size = (tensor.get("parameters") or {}).get("binary_data_size")
    if (size is None) == (tensor.get("data") is None):
        raise Problem("validation", f"inputs: {name} needs either data or binary_data_size")
    count = 1
    for extent in tensor["shape"]:
        count *= int(extent)
    if count > most:
        raise Problem("validation", f"inputs: {name} has {count} elements; expected at most {most}")
    if size is None:
        values = [each for item in tensor["data"] for each in (item if isinstance(item, list) else [item])]
    else:
        values, rest = _unpack(rest[: int(size)], name, count), rest[int(size) :]
    if len(values) != count:
        raise Problem("validation", f"inputs: {name} has shape {tensor['shape']} and {len(values)} elements")
    return values, rest


def _unpack(data: bytes, name: str, count: int) -> list[str]:
    values: list[str] = []
    at = 0
    while at < len(data) and len(values) <= count:
        size = int.from_bytes(data[at : at + 4], "little")
        part = data[at + 4 : at + 4 + size]
        at += 4 + size
        if at > len(data):
            raise Problem("validation", f"inputs: {name} ends within an element")
        try:
            values.append(part.decode())
        except UnicodeDecodeError:
            raise Problem("validation", f"inputs: {name} expected UTF-8") from None
    return values


INFER = Scoring(Dialect("kserve", refusal), BODY, infer, ANSWER)
