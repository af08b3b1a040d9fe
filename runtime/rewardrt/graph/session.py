"""One graph, loaded and ready: token ids and lengths in, raw rewards out.

This module knows the graph's inputs and outputs (see docs/bundle.md) and onnxruntime's options. It knows nothing of
texts, tokenizers or bundles.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rewardrt.errors import BundleError, InferenceError, ProviderError
from rewardrt.forks import after_fork
from rewardrt.graph.engine import EngineRequest, open_engine, refusal
from rewardrt.graph.graph_file import resolve
from rewardrt.graph.shapes import Profile
from rewardrt.machine import denormals
from rewardrt.machine.kernels import register
from rewardrt.machine.providers import (
    Provider,
    ProviderChoice,
    Selection,
    describe,
    import_onnxruntime,
    one_line,
    open_session,
    quiet_options,
    select_provider,
)

Ids = npt.NDArray[np.int64]

PER_TOKEN = ("input_ids", "token_type_ids")
OPTIONAL_INPUTS = ("positions", "token_type_ids")  # for models with several taps, and for encoders that read pairs
PAST_BATCH = "past_batch"  # name of the first axis of keys and values if one prefix may serve a batch of any size
_FLOATS: dict[str, type[np.floating[Any]]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class PastInput:
    """One of the graph's inputs for a shared prefix: keys, values or a layer's state, [batch, *shape].

    `shape` is the shape for a prefix of no tokens: (kv_heads, 0, head_dim) for keys and values. A state has the same
    shape after any number of tokens.
    """

    name: str
    shape: tuple[int, ...]
    dtype: type[np.floating[Any]]

    @property
    def is_state(self) -> bool:
        """Whether it is the state of a layer (linear attention, Mamba, a convolution), not keys or values."""
        return self.name.startswith("past_state.")


States = tuple[npt.NDArray[Any], ...]  # each [1, ...], in the order of the graph's inputs


@dataclass(frozen=True)
class KeyValues:
    """The KV cache of one text's first tokens: what the graph needs to continue from there.

    `arrays` are the keys and values, each [1, kv_heads, tokens, head_dim], in the order of the graph's inputs. Layers
    with a recurrent state have one state for all tokens so far, not one per token: `states` maps a number of tokens to
    the states after that many tokens, and is empty if no layer has a state.
    """

    arrays: tuple[npt.NDArray[Any], ...]
    states: Mapping[int, States] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """The number of tokens that are cached."""
        return int(self.arrays[0].shape[2]) if self.arrays else max(self.states, default=0)

    @property
    def bytes(self) -> int:
        """The size in memory, in bytes."""
        return sum(array.nbytes for arrays in (self.arrays, *self.states.values()) for array in arrays)

    def first(self, tokens: int) -> KeyValues | None:
        """Return the cache of the first `tokens` tokens: a copy, unless that is all of them.

        With states, the result ends at the last number of tokens, up to `tokens`, after which there is a state; None if
        there is none.
        """
        states = {end: state for end, state in self.states.items() if end <= tokens}
        if self.states and not states:
            return None
        tokens = max(states, default=tokens)
        if tokens == self.tokens:
            return self
        return KeyValues(tuple(np.ascontiguousarray(array[:, :, :tokens]) for array in self.arrays), states)

    def block(self, start: int, tokens: int) -> KeyValues:
        """Return a copy of the cache of `tokens` tokens from `start` on, which keeps no other memory alive.

        Of the states it contains the one after its last token, if there is one.
        """
        end = start + tokens
        states = {end: self.states[end]} if end in self.states else {}
        return KeyValues(tuple(array[:, :, start:end].copy() for array in self.arrays), states)


@dataclass(frozen=True)
class Part:
    """The graph's outputs for a part of one text; `values` is the cache of all tokens so far, if it was requested."""

    rewards: npt.NDArray[np.float32]  # [1, outputs], or [1, tokens, outputs] token_rewards
    values: KeyValues | None


class GraphSession:
    """A reward graph on one execution provider. `run` may be called from several threads at once.

    `provider` is the provider obtained, `note` says why it is not a better one, and `threads` is the number requested.
    `past` lists the graph's inputs for a shared prefix: key, value, key, ... by layer, then states; it is empty for an
    encoder. `shares_past` says whether the prefix of one text (batch 1) may serve every row of a batch.

    In a forked process the graph is opened again when it is first run there.
    """

    def __init__(
        self,
        session: Any,
        past: tuple[PastInput, ...],
        provider: Provider,
        note: str | None,
        threads: int | None,
        reopen: Callable[[], Any],
    ) -> None:
        """Wrap an `onnxruntime.InferenceSession` whose inputs and outputs were checked; callers use `open`."""
        self._session: Any = session  # None in a forked process, until it is first needed
        self._reopen = reopen
        self._reopening = threading.Lock()
        _ALIVE.add(self)
        self._optional = {item.name for item in session.get_inputs()} & set(OPTIONAL_INPUTS)
        self.has_token_rewards = any(item.name == "token_rewards" for item in session.get_outputs())
        self.past = past
        self.shares_past = any(
            item.name.startswith("past_") and item.shape[0] == PAST_BATCH for item in session.get_inputs()
        )
        self.provider: Provider = provider
        self.note = note
        self.threads = threads
        self.profile: Profile | None = None  # set for a TensorRT engine, whose batches are padded to a few shapes

    @classmethod
    def open(
        cls,
        graph: Path,
        provider: ProviderChoice | Selection = "auto",
        threads: int | None = None,
        *,
        share_weights: bool = False,
        unchanged: Callable[[], object] = lambda: None,
        engine: EngineRequest | None = None,
    ) -> GraphSession:
        """Load a graph by its path.

        onnxruntime maps the file of the weights into memory, and copies the weights that it repacks for its kernels.
        With `share_weights`, the matrix products of an int8 graph read their weights directly from the mapped file,
        which all processes of the machine share.

        `provider` is the caller's choice, or a Selection that was already tested and is not tested again. `threads` is
        the number of threads of one call on the CPU; None leaves it to onnxruntime, which takes one for each physical
        core, even if a container may use fewer. `unchanged` is called before a forked process opens the graph again,
        and raises if the file is not the same. `engine` describes the engine that TensorRT builds and caches.

        Raises ProviderError if the provider cannot be obtained, and BundleError if the file is not a graph with the
        expected inputs and outputs.
        """
        if threads is not None and threads < 1:
            raise ProviderError(f"threads {threads}: expected at least 1, or None to leave it to onnxruntime")
        selection = provider if isinstance(provider, Selection) else select_provider(provider)
        note = selection.note
        if selection.provider == "tensorrt" and engine is not None:
            session, note = _open_engine(graph, engine, threads)
        else:
            session = _open(graph, selection.provider, threads, share_weights=share_weights)
        absolute = Path(os.path.abspath(graph))  # a forked process may change its working directory

        def reopen() -> Any:
            if selection.provider != "cpu":
                raise ProviderError(
                    f"the model was loaded on {selection.provider} before this process was forked, and CUDA does not "
                    "survive a fork; load it after the fork, or start processes by spawn"
                )
            unchanged()
            return _open(absolute, selection.provider, threads, share_weights=share_weights)

        opened = cls(session, _read_contract(session, graph), selection.provider, note, threads, reopen)
        opened.profile = engine.profile if selection.provider == "tensorrt" and engine is not None else None
        return opened

    @property
    def runs_on(self) -> str:
        """What really runs, for people: the provider, and for TensorRT its version and the GPU."""
        return describe(self.provider)

    def warm(self, batch_tokens: int, shown: Callable[[int, int], None] = lambda done, of: None) -> int:
        """Run each shape once to which batches of at most `batch_tokens` tokens are padded; return how many there are.

        There are none without an engine. `shown` is called with the number of shapes done and their total. Raises
        InferenceError.
        """
        shapes = self.profile.buckets(batch_tokens) if self.profile is not None else []
        taps = [item.shape[1] for item in self._live().get_inputs() if item.name == "positions"]
        for done, (rows, tokens) in enumerate(shapes):
            ids = np.zeros((rows, tokens), np.int64)
            places = np.zeros((rows, taps[0]), np.int64) if taps else None
            self.run(ids, np.full(rows, tokens, np.int64), places, ids)
            shown(done + 1, len(shapes))
        return len(shapes)

    def run(
        self,
        input_ids: Ids,
        lengths: Ids,
        positions: Ids | None = None,
        type_ids: Ids | None = None,
        *,
        past: KeyValues | None = None,
        output: Literal["rewards", "token_rewards"] = "rewards",
    ) -> npt.NDArray[np.float32]:
        """Score a batch: return [batch, outputs] float32, or [batch, tokens, outputs] for the output token_rewards.

        input_ids is [batch, tokens], right-padded, and lengths [batch]; positions [batch, taps] and type_ids [batch,
        tokens] are needed if the model has these inputs. All are int64. `past` is the cache of a prefix of every row,
        for graphs with `shares_past`. The values are the graph's raw outputs; the caller checks that they are finite.

        Raises InferenceError if an argument is wrong or missing, or if the graph fails.
        """
        return self._run(input_ids, lengths, positions, type_ids, past, [output])[0]

    def run_part(
        self,
        input_ids: Ids,
        positions: Ids | None = None,
        *,
        past: KeyValues | None = None,
        keep: bool = False,
        output: Literal["rewards", "token_rewards"] = "rewards",
    ) -> Part:
        """Compute one part of one text, input_ids [1, tokens] int64, which continues the tokens cached in `past`.

        `positions` [1, taps] int64 count from the part's first token. With `keep`, the result also has the keys and
        values of `past` and the part, and the states after the part's last token. Raises InferenceError.
        """
        names = [output, *(item.name.replace("past_", "present_") for item in self.past if keep)]
        lengths = np.array([input_ids.shape[1]], dtype=np.int64)
        rewards, *found = self._run(input_ids, lengths, positions, None, past, names)
        if not keep:
            return Part(rewards, None)
        states = tuple(array for item, array in zip(self.past, found, strict=True) if item.is_state)
        tokens = input_ids.shape[1] + (past.tokens if past is not None else 0)
        return Part(rewards, KeyValues(tuple(found[: len(found) - len(states)]), {tokens: states} if states else {}))

    def _run(
        self,
        input_ids: Ids,
        lengths: Ids,
        positions: Ids | None,
        type_ids: Ids | None,
        past: KeyValues | None,
        outputs: list[str],
    ) -> list[npt.NDArray[Any]]:
        if input_ids.ndim != 2 or lengths.shape != input_ids.shape[:1]:
            raise InferenceError(
                f"expected input_ids [batch, tokens] and lengths [batch], found {input_ids.shape} and {lengths.shape}"
            )
        if lengths.size == 0 or lengths.min() < 1 or lengths.max() > input_ids.shape[1]:
            raise InferenceError(
                f"lengths {lengths.tolist()[:8]}: expected 1 to {input_ids.shape[1]}, one for each row"
            )
        feeds: dict[str, npt.NDArray[Any]] = {"input_ids": input_ids, "lengths": lengths}
        for name, array in (("positions", positions), ("token_type_ids", type_ids)):
            if name in self._optional:
                if array is None:
                    raise InferenceError(f"the graph takes {name}, and none were given")
                feeds[name] = array
        if past is None:
            for item in self.past:
                feeds[item.name] = np.zeros((len(input_ids), *item.shape), item.dtype)
        elif not self.past:
            raise InferenceError("the graph takes no past, and one was given")
        else:
            given = (*past.arrays, *past.states.get(past.tokens, ()))
            feeds |= {item.name: array for item, array in zip(self.past, given, strict=True)}
        session = self._live()
        try:
            with denormals.as_zero():
                found = (
                    session.run(outputs, feeds)
                    if self.profile is None
                    else _in_shapes(session, outputs, feeds, self.profile)
                )
        except InferenceError:
            raise
        except Exception as error:  # onnxruntime's exceptions share no base class
            batch = f"{len(input_ids)} x {input_ids.shape[1]} tokens"
            raise InferenceError(f"the graph failed on {batch} ({one_line(error)})") from error
        return [np.asarray(array) for array in found]

    def _live(self) -> Any:
        """Return this process's session; open it first in a forked process."""
        session = self._session
        if session is None:
            with self._reopening:
                if self._session is None:
                    self._session = self._reopen()
                session = self._session
        return session

    def _forked(self) -> None:
        """Drop a session whose threads belong to the parent process.

        Destroying it here would wait for those threads, or crash.
        """
        if self._session is not None:
            _never_destroy(self._session)
        self._session = None
        self._reopening = threading.Lock()  # the old lock may have been held at the fork


_ALIVE: weakref.WeakSet[GraphSession] = weakref.WeakSet()


def _forked() -> None:
    for session in list(_ALIVE):
        session._forked()


def _never_destroy(thing: object) -> None:
    """Keep an object alive until the process ends, by a reference that is never released.

    A global variable would not do: the interpreter clears them when it exits.
    """
    increase = ctypes.pythonapi.Py_IncRef
    increase.argtypes, increase.restype = [ctypes.py_object], None
    increase(thing)


after_fork(_forked)


def _in_shapes(
    session: Any, outputs: list[str], feeds: Mapping[str, npt.NDArray[Any]], profile: Profile
) -> list[npt.NDArray[Any]]:
    """Run a batch padded to the shapes of a profile, a few rows at a time, and drop the results of the padding."""
    every, tokens = feeds["input_ids"].shape
    if tokens > profile.tokens:
        raise InferenceError(f"a text of {tokens} tokens: the engine is built for {profile.describe()}")
    parts = []
    for start in range(0, every, profile.rows):
        rows = min(profile.rows, every - start)
        wide = profile.bucket(rows, tokens)
        padded = {}
        for name, array in feeds.items():
            sizes = (wide[0], *((wide[1],) if name in PER_TOKEN else array.shape[1:]))
            # Each added row is a text of one token.
            padded[name] = (np.ones if name == "lengths" else np.zeros)(sizes, array.dtype)
            padded[name][(slice(rows), *(slice(size) for size in array.shape[1:]))] = array[start : start + rows]
        found = zip(outputs, session.run(outputs, padded), strict=True)
        parts.append([array[:rows, :tokens] if name == "token_rewards" else array[:rows] for name, array in found])
    return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def _options_and_model(graph: Path, threads: int | None) -> tuple[Any, bytes | str]:
    options = _session_options(threads)
    model, folder = resolve(graph)
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return options, model if isinstance(model, bytes) else str(model)


def _open_engine(graph: Path, engine: EngineRequest, threads: int | None) -> tuple[Any, str | None]:
    _, model = _options_and_model(graph, threads)
    try:
        return open_engine(model, engine, lambda: _options_and_model(graph, threads)[0])
    except ProviderError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ProviderError(f"{graph}: {refusal(error)}") from error


def _open(graph: Path, provider: Provider, threads: int | None, *, share_weights: bool) -> Any:
    options, model = _options_and_model(graph, threads)
    try:
        if provider == "cpu":
            register(options, share_weights=share_weights)
        with denormals.unchanged():  # onnxruntime changes the thread that opens a process's first session
            return open_session(model, provider, options)
    except ProviderError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no base class
        if provider != "cpu":  # for example, the device is out of memory: the file is not at fault
            message = f"{graph}: does not load on {provider} ({one_line(error)}); try the provider 'cpu'"
            raise ProviderError(message) from error
        raise BundleError(
            f"{graph}: onnxruntime cannot load it ({one_line(error)}); upgrade onnxruntime, or export again"
        ) from error


def _session_options(threads: int | None) -> Any:
    ort = import_onnxruntime()
    options = quiet_options(ort)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL  # one reward graph is a chain
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
    # onnxruntime keeps a memory pattern for each shape that it has seen. Here almost every batch has another shape, and
    # patterns gave no measurable gain. The memory arena stays on. Over random batches of up to 2,048 tokens with a
    # model of 18 million parameters, it grew to what the largest batch needs (420 MB) and no further. Without the
    # arena, memory is freed after each run (200 MB), for 18% more CPU time; shrinking the arena after each run (200 MB)
    # costs 6%.
    options.enable_mem_pattern = False
    if denormals.CAN_BE_ZERO:  # this sets onnxruntime's threads; `run` sets the calling thread
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return options


def _read_contract(session: Any, graph: Path) -> tuple[PastInput, ...]:
    """Check the names and types of the graph's inputs and outputs; return its inputs for a shared prefix.

    Layers, heads, head sizes and states are read off the graph's own shapes. Raises BundleError.
    """
    inputs = {item.name: item for item in session.get_inputs()}
    outputs = {item.name: item for item in session.get_outputs()}
    parts = [f"{part}.{layer}" for layer in range(_count(inputs, "key|value")) for part in ("key", "value")]
    parts += [f"state.{place}" for place in range(_count(inputs, "state"))]
    needed_inputs = ["input_ids", "lengths", *(f"past_{part}" for part in parts)]
    needed_outputs = ["rewards", *(f"present_{part}" for part in parts)]
    faults = [f"no input {name}" for name in needed_inputs if name not in inputs]
    faults += [f"unknown input {name}" for name in inputs if name not in (*needed_inputs, *OPTIONAL_INPUTS)]
    faults += [f"no output {name}" for name in needed_outputs if name not in outputs]
    faults += _type_faults(inputs, dict.fromkeys(("input_ids", "lengths", *OPTIONAL_INPUTS), "tensor(int64)"))
    faults += _type_faults(outputs, dict.fromkeys(("rewards", "token_rewards"), "tensor(float)"))
    past = []
    for item in (inputs[f"past_{part}"] for part in parts if f"past_{part}" in inputs):
        shape, dtype = item.shape, _FLOATS.get(item.type)
        state = item.name.startswith("past_state.")
        sizes = [0 if place == 2 and not state else size for place, size in enumerate(shape)][1:]
        if dtype is None or not all(isinstance(size, int) for size in sizes) or not (len(shape) == 4 or state):
            expected = "float [batch, ...] of known sizes" if state else "float [batch, kv_heads, past, head_dim]"
            faults.append(f"{item.name} is {item.type} {shape}, not {expected}")
        else:
            past.append(PastInput(item.name, tuple(sizes), dtype))
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise BundleError(f"{graph}: not a reward graph: {', '.join(faults[:4])}{more}; export the checkpoint again")
    return tuple(past)


def _count(inputs: Mapping[str, Any], part: str) -> int:
    """Return the number of layers that have an input `past_<part>.<layer>`."""
    found = (re.fullmatch(rf"past_({part})\.(\d+)", name) for name in inputs)
    return 1 + max((int(match[2]) for match in found if match), default=-1)


def _type_faults(found: Mapping[str, Any], expected: Mapping[str, str]) -> list[str]:
    return [
        f"{name} is {found[name].type}, not {kind}"
        for name, kind in expected.items()
        if name in found and found[name].type != kind
    ]
