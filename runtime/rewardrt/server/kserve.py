"""KServe's Open Inference Protocol, version 2, over HTTP: `/v2/models/{model}/infer`, also with binary data.

The path may name a model version. The input `text` is scored as sent; `prompt` and `response` together are a
conversation. The output is `score` [n, 1]; on request also `tokens` and `truncated` [n, 1].

NeMo-Aligner uses this protocol for its reward models, with Triton. Its input is `sentences`, texts that are scored as
sent, or `tokens` [n, length], token ids of which the first `sequence_lengths` [n, 1] count. Its outputs are `rewards`
and, for some of its scripts, `exceeded`: whether a text was cut. Its client, PyTriton's, first requests the model's
configuration, and then every output named there.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from rewardrt.scoring.scored import Scored, shortest
from rewardrt.server.call import Call, Dialect, Incoming, Outcome, Reply, Scoring
from rewardrt.server.models import Served
from rewardrt.server.problem import Problem
from rewardrt.server.schema import BOOLEAN, INTEGER, STRING, STRINGS, array, body, only
from rewardrt.server.vocabulary import answers, single_rewards, texts
from rewardrt.text.items import TokenIds
from rewardrt.text.rows import Row

LENGTH_HEADER = "inference-header-content-length"
# Tensors and their data types; the first dimension is the number of texts.
INPUTS = {
    "text": "BYTES",
    "prompt": "BYTES",
    "response": "BYTES",
    "sentences": "BYTES",
    "tokens": "INT64",
    "sequence_lengths": "INT64",
}
OUTPUTS = {"score": "FP32", "tokens": "INT64", "truncated": "INT64", "rewards": "FP32", "exceeded": "BOOL"}
PACKED = {"FP32": "f", "INT64": "q", "BOOL": "?"}  # as binary data, little endian
VERSION = "1"
MAX_DIMENSIONS, MAX_EXTENT = 4, 2**31
BODY = body(
    {
        "inputs": array(
            body(
                {
                    "name": only(*INPUTS),
                    "shape": array(INTEGER | {"minimum": 0, "maximum": MAX_EXTENT}, maxItems=MAX_DIMENSIONS),
                    "datatype": only("BYTES", "INT64"),
                },
                data={"anyOf": [STRINGS, array(INTEGER), array(STRINGS), array(array(INTEGER))]},
                parameters=body(binary_data_size=INTEGER | {"minimum": 0}),
            ),
            maxItems=2,
        )
    },
    id=STRING,
    outputs=array(body({"name": only(*OUTPUTS)}, parameters=body(binary_data=BOOLEAN)), maxItems=len(OUTPUTS)),
    # The instruction, and scheduling parameters of Triton's clients, which do not affect scores.
    parameters=body(binary_data_output=BOOLEAN, priority=INTEGER, timeout=INTEGER, instruction=STRING),
)
ANSWER = {
    "type": "object",
    "properties": {"model_name": STRING, "id": STRING, "outputs": array({"type": "object"})},
    "required": ["model_name", "outputs"],
}


def refusal(status: int, problem: Problem) -> dict[str, Any]:
    """Return the body of a refused request."""
    return {"error": problem.message}


def split(data: bytes, headers: Mapping[str, str]) -> tuple[bytes, bytes]:
    """Return the JSON part of a body, and the binary data after it."""
    size = headers.get(LENGTH_HEADER)
    if size is None:
        return data, b""
    if not (size.isascii() and size.isdigit() and len(size) < 20) or int(size) > len(data):
        raise Problem("validation", f"{LENGTH_HEADER}: expected at most the {len(data)} bytes of the body")
    return data[: int(size)], data[int(size) :]


def check_version(path: Mapping[str, str]) -> None:
    """Raise Problem for any other model version than the only one that exists."""
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
    tensors: dict[str, list[Any]] = {}
    rest = incoming.binary
    for tensor in wanted["inputs"]:
        values, rest = _values(tensor, rest, served.options.max_items)
        if tensor["name"] in tensors:
            raise Problem("validation", f"inputs: {tensor['name']} is there twice")
        tensors[tensor["name"]] = values
    if rest:
        raise Problem("validation", f"body: {len(rest)} bytes of binary data belong to no input")
    parameters = wanted.get("parameters") or {}
    rows = _rows(served, tensors, parameters.get("instruction"))
    theirs = not {"sentences", "sequence_lengths"}.isdisjoint(tensors)
    outputs = wanted.get("outputs") or [{"name": "rewards" if theirs else "score"}]
    binary = bool(parameters.get("binary_data_output"))

    def render(outcome: Outcome) -> Any:
        scores = outcome.scores
        found, blobs = [], []
        for output in outputs:
            name = output["name"]
            kind, column = OUTPUTS[name], _column(name, scores)
            tensor = {"name": name, "shape": [len(scores), 1], "datatype": kind}
            asked = (output.get("parameters") or {}).get("binary_data")
            if binary if asked is None else asked:
                blobs.append(struct.pack(f"<{len(scores)}{PACKED[kind]}", *column))
                found.append(tensor | {"parameters": {"binary_data_size": len(blobs[-1])}})
            else:
                found.append(tensor | {"data": column})
        answer = {"model_name": served.name, "model_version": VERSION, "outputs": found}
        if wanted.get("id") is not None:
            answer["id"] = wanted["id"]
        if not blobs:
            return answer
        head = json.dumps(answer).encode()
        headers = ((LENGTH_HEADER, str(len(head))),)
        return Reply(head + b"".join(blobs), "application/octet-stream", headers)

    return Call(served, rows, render)


def _column(name: str, scores: Sequence[Scored]) -> list[Any]:
    """Return the elements of an output, one for each text."""
    match name:
        case "tokens":
            return [score.tokens for score in scores]
        case "truncated":
            return [score.truncated for score in scores]
        case "exceeded":
            return [score.truncated > 0 for score in scores]
    return [shortest(score.reward) for score in scores]


def _rows(served: Served, tensors: Mapping[str, list[Any]], instruction: str | None) -> tuple[Row, ...]:
    """Return the rows for one of the supported combinations of inputs."""
    names = set(tensors)
    if names == {"prompt", "response"} and len(tensors["prompt"]) == len(tensors["response"]):
        return answers(served, list(zip(tensors["prompt"], tensors["response"], strict=True)), instruction)
    if instruction is not None:
        raise Problem("validation", "parameters.instruction: expected it only with prompt and response")
    if names in ({"text"}, {"sentences"}):
        (values,) = tensors.values()
        return texts(served, values)
    if names == {"tokens", "sequence_lengths"} and len(tensors["tokens"]) == len(tensors["sequence_lengths"]):
        return tuple(map(_ids, tensors["tokens"], tensors["sequence_lengths"]))
    expected = "text or sentences, or prompt and response or tokens and sequence_lengths with as many elements each"
    raise Problem("validation", f"inputs: expected {expected}")


def _ids(ids: list[int], count: int) -> Row:
    if not 0 < count <= len(ids):
        raise Problem("validation", f"inputs: sequence_lengths expected 1 to {len(ids)}, as many as tokens has")
    return Row("single", (TokenIds(tuple(map(int, ids[: int(count)]))),))


def _values(tensor: dict[str, Any], rest: bytes, most: int) -> tuple[list[Any], bytes]:
    """Return a tensor's values, one for each of at most `most` texts, and the binary data after it.

    A value is a string, a number of `sequence_lengths`, or a list of the ids of `tokens`.
    """
    name, shape = tensor["name"], [int(extent) for extent in tensor["shape"]]
    kind = INPUTS[name]
    if tensor["datatype"] != kind:
        raise Problem("validation", f"inputs: {name} expected the datatype {kind}, found {tensor['datatype']}")
    if name == "tokens" and len(shape) != 2:
        raise Problem("validation", f"inputs: tokens expected a shape of 2 extents, found {len(shape)}")
    size = (tensor.get("parameters") or {}).get("binary_data_size")
    if (size is None) == (tensor.get("data") is None):
        raise Problem("validation", f"inputs: {name} needs either data or binary_data_size")
    texts_in, count = math.prod(shape[:1] if name == "tokens" else shape), math.prod(shape)
    if texts_in > most:
        raise Problem("too_many", f"inputs: {name} has {texts_in} elements; expected at most {most}")
    if size is None:
        values = [each for item in tensor["data"] for each in (item if isinstance(item, list) else [item])]
        if any(isinstance(value, str) != (kind == "BYTES") for value in values):
            raise Problem("validation", f"inputs: {name} expected {'strings' if kind == 'BYTES' else 'integers'}")
    else:
        unpack = _strings if kind == "BYTES" else _integers
        values, rest = unpack(rest[: int(size)], name, count), rest[int(size) :]
    if len(values) != count:
        raise Problem("validation", f"inputs: {name} has shape {tensor['shape']} and {len(values)} elements")
    if name == "tokens":
        values = [values[at : at + shape[1]] for at in range(0, count, max(1, shape[1]))]
    return values, rest


def _integers(data: bytes, name: str, count: int) -> list[int]:
    if len(data) != 8 * count:
        raise Problem("validation", f"inputs: {name} expected {8 * count} bytes, found {len(data)}")
    return list(struct.unpack(f"<{count}q", data))


def _strings(data: bytes, name: str, count: int) -> list[str]:
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
