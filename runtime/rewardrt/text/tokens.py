"""From the text to the token ids that the graph reads, and the positions at which its hidden states are read.

Only this module imports the `tokenizers` library. It knows nothing of batches or graphs.
"""

from __future__ import annotations

import itertools
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from rewardrt.bundle.spec import Spec
from rewardrt.errors import BundleError, RowError
from rewardrt.forks import after_fork
from rewardrt.text.items import utf8_bytes
from rewardrt.text.rendering import PLACEHOLDER, RenderedText
from rewardrt.text.taps import Ids, run_starts, tap_positions

# The tokenizers library takes about 160 bytes of memory for each byte of text. So one call gets texts of at most
# BATCH_BYTES together. One text may have LONGEST_BYTES, or BYTES_PER_TOKEN times the model's max_length if that is
# more.
BATCH_BYTES = 2 * 2**20
LONGEST_BYTES = 4 * 2**20
BYTES_PER_TOKEN = 16


@dataclass(frozen=True)
class EncodedText:
    """One text as the model reads it, without padding."""

    ids: Ids  # [tokens] int64, at most max_length
    truncated: int  # tokens that were cut off
    positions: Ids  # [taps] int64, indices into ids; [steps] in order for a model that rewards steps
    type_ids: Ids | None = None  # [tokens] int64: 0 and 1 for the two texts of a pair

    @property
    def needed(self) -> int:
        """The number of ids that a causal model has to read: up to the last position that is read, inclusive."""
        return int(self.positions.max()) + 1


@dataclass(frozen=True)
class _Kept:
    """The part of an encoding that is left after a cut."""

    ids: Ids
    type_ids: Ids


class Tokenizer:
    """The bundle's tokenizer, with the spec's rules for special tokens, length and positions."""

    def __init__(self, path: Path, spec: Spec) -> None:
        try:
            self._backend = Backend.from_file(str(path))
            # A saved tokenizer may pad or cut by itself; here the spec decides both.
            self._backend.no_padding()
            self._backend.no_truncation()
            self._backend.encode_special_tokens = spec.text.split_special_tokens
            # The special token that the tokenizer itself puts before a text, such as BOS; -1 if it adds none.
            self._first_special = next(iter(self._backend.encode("", add_special_tokens=True).ids), -1)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises Exception, or for some files a panic (a BaseException)
            raise BundleError(f"{path}: not a tokenizer that this tokenizers version reads ({error})") from error
        self._spec = spec
        self._cuts = spec.text.source in ("pair", "segments")
        _ALIVE.add(self)

    def encode(self, text: RenderedText, *, max_length: int | None = None) -> EncodedText:
        """Encode one text; see `encode_many`."""
        encoded = self.encode_many([text], max_length=max_length)[0]
        if isinstance(encoded, RowError):
            raise encoded
        return encoded

    def encode_whole(self, text: RenderedText) -> Ids:
        """Return all token ids of a text, int64 [tokens], before the spec cuts them or adds ids before and after."""
        if text.pieces:
            return np.concatenate(self._encode_pieces(text))
        special = self.adds_special_tokens(text)
        return np.array(self._backend.encode(text.text, text.pair, add_special_tokens=special).ids, dtype=np.int64)

    def encode_ids(self, ids: Sequence[int], *, max_length: int | None = None) -> EncodedText:
        """Take token ids unchanged, cut to the limit.

        Raises RowError for an id that the tokenizer or model does not have.
        """
        if len(ids) == 0:
            raise RowError("the text has no tokens; expected at least one")
        known = min(self._backend.get_vocab_size(), self._spec.vocabulary or sys.maxsize)
        if min(ids) < 0 or max(ids) >= known:  # check before numpy does: the integers may be of any size
            wrong = str(next(each for each in ids if not 0 <= each < known))
            raise RowError(f"token id {wrong[:40]}: expected 0 to {known - 1}")
        if self._spec.input == "steps" or self._spec.reads_prompt_end:
            raise RowError("this model reads more of a text than its token ids say; send the text")
        limit = min(self._spec.max_length, max_length or self._spec.max_length)
        kept = np.array(ids[:limit], dtype=np.int64)
        type_ids = np.zeros_like(kept) if self._spec.text.type_ids else None
        return EncodedText(kept, len(ids) - len(kept), tap_positions(kept, self._spec.taps), type_ids)

    def pieces(self, text: RenderedText) -> list[str]:
        """Split the text into one piece per token, for display; joined, the pieces are the text.

        A normalizer may make one character from several, or remove some, and then the tokens' own offsets do not cover
        the text. Characters left over are added to the piece of the token before them, and white space to the one after
        it.
        """
        encoding = self._backend.encode(text.text, add_special_tokens=self.adds_special_tokens(text))
        own = [index for index, special in enumerate(encoding.special_tokens_mask) if not special]
        own = own or list(range(len(encoding.ids)))[-1:]  # the normalizer removed the whole text
        cuts: dict[int, int] = {}
        end = 0
        for index, following in itertools.pairwise(own):
            end = max(end, encoding.offsets[index][1])
            gap = text.text[end : encoding.offsets[following][0]]
            end += next((place for place, letter in enumerate(gap) if letter.isspace()), len(gap))
            cuts[index] = end
        if own:
            cuts[own[-1]] = len(text.text)
        pieces, start = [], 0
        for index in range(len(encoding.ids)):
            pieces.append(text.text[start : cuts.get(index, start)])
            start = max(start, cuts.get(index, start))
        return pieces

    def encode_many(
        self, texts: Sequence[RenderedText], *, max_length: int | None = None
    ) -> list[EncodedText | RowError]:
        """Encode texts in order.

        A text that cannot be encoded gives a RowError in its place, and the others are not affected.

        That happens if a tap finds no position to read, if a text is too long for its rule, or if the tokenizer itself
        fails. `max_length` can lower the spec's limit (in tokens), not raise it.
        """
        limit = min(self._spec.max_length, max_length or self._spec.max_length)
        results: list[EncodedText | RowError | None] = [None] * len(texts)
        sizes = [_bytes_of(text) for text in texts]
        for i, text in enumerate(texts):
            try:
                self._check_size(sizes[i])
                if text.pieces:
                    with _at_this_text():
                        results[i] = self._finish_pieces(text, limit)
            except RowError as error:
                results[i] = error
        for add_special_tokens in (False, True):
            chosen = [
                i
                for i, text in enumerate(texts)
                if results[i] is None and self.adds_special_tokens(text) == add_special_tokens
            ]
            for some in _in_batches(chosen, sizes):
                inputs = [texts[i].text if texts[i].pair is None else (texts[i].text, texts[i].pair) for i in some]
                for i, encoding in zip(some, self._encode_batch(inputs, add_special_tokens), strict=True):
                    if isinstance(encoding, RowError):
                        results[i] = encoding
                        continue
                    try:
                        cut = self._cut(encoding, limit)
                        with _at_this_text():
                            results[i] = self._finish(cut, len(encoding.ids) - len(cut.ids), texts[i], limit)
                    except RowError as error:
                        results[i] = error
        return [self._known(result) for result in results if result is not None]

    def _check_size(self, size: int) -> None:
        """Raise RowError for a text whose tokens would take too much memory."""
        most = max(LONGEST_BYTES, BYTES_PER_TOKEN * self._spec.max_length)
        if size > most:
            raise RowError(
                f"the text is of {size} bytes, and this model reads {self._spec.max_length} tokens; "
                f"expected at most {most} bytes: shorten it"
            )

    def _known(self, result: EncodedText | RowError) -> EncodedText | RowError:
        """Return the result, or a RowError if the model has no embedding for one of its tokens."""
        rows = self._spec.vocabulary
        if isinstance(result, RowError) or rows is None or result.ids.max() < rows:
            return result
        wrong = int(result.ids[result.ids >= rows][0])
        return RowError(
            f"the text holds {self._backend.id_to_token(wrong)!r} (token id {wrong}), and the model knows the ids 0 to "
            f"{rows - 1}: its tokenizer has tokens that it was never trained on; leave them out of the text"
        )

    def _encode_batch(self, inputs: Sequence[Any], add_special_tokens: bool) -> list[Any]:
        """Return an encoding for each text, or a RowError for each text at which the library fails."""
        try:
            with _at_this_text():
                return list(self._backend.encode_batch_fast(inputs, add_special_tokens=add_special_tokens))
        except RowError as error:
            if len(inputs) == 1:
                return [error]
        half = len(inputs) // 2
        return [
            encoding
            for part in (inputs[:half], inputs[half:])
            for encoding in self._encode_batch(part, add_special_tokens)
        ]

    def adds_special_tokens(self, text: RenderedText) -> bool:
        """Whether the tokenizer adds its own special tokens.

        To raw text it adds them only if the model reads pairs, or if they were requested.
        """
        if text.is_raw and text.special_tokens:
            return True
        rule = self._spec.text
        return rule.add_special_tokens and (rule.source == "pair" or not text.is_raw)

    def _cut(self, encoding: Any, limit: int) -> Any:
        """Cut an encoding of a text pair or a segment to `limit` tokens, as transformers' `longest_first` does.

        Special tokens are kept. The library's own truncation is not used: it also builds every combination of the parts
        that it cuts off, which takes time and memory quadratic in the texts.
        """
        if not self._cuts or len(encoding.ids) <= limit:
            return encoding
        owner = np.array(
            [-1 if number is None else number for number in encoding.sequence_ids]
        )  # 0, 1; -1: special token
        first, second = owner == 0, owner == 1
        special = int((owner < 0).sum())
        if limit <= special:
            raise RowError(f"a limit of {limit} tokens leaves no room for text beside {special} special tokens")
        kept_first, kept_second = longest_first(int(first.sum()), int(second.sum()), limit - special)
        kept = (owner < 0) | (first & (first.cumsum() <= kept_first)) | (second & (second.cumsum() <= kept_second))
        return _Kept(np.array(encoding.ids)[kept], np.array(encoding.type_ids)[kept])

    def _finish(self, encoding: Any, cut: int, text: RenderedText, limit: int) -> EncodedText:
        whole = np.array(encoding.ids, dtype=np.int64)
        if text.is_raw and text.special_tokens and len(whole) > 1 and whole[0] == whole[1] == self._first_special:
            whole = whole[1:]  # the text has its own BOS, and the model was not trained on two
        ids, truncated = self._fit(whole, text, limit)
        if self._spec.input == "steps":
            positions = self._step_positions(run_starts(whole, self._spec.taps[0].ids), text, limit)
        else:
            positions = tap_positions(ids, self._spec.taps, self._prompt_tokens(text))
        told = self._spec.text.type_ids
        type_ids = np.array(encoding.type_ids, dtype=np.int64)[: len(ids)] if told else None
        return EncodedText(ids, cut + truncated, positions, type_ids)

    def _finish_pieces(self, text: RenderedText, limit: int) -> EncodedText:
        """Encode a text whose pieces are tokenized separately, so that the first token of each step token is known."""
        if self._spec.text.source == "segments":
            return self._finish_segments(text, limit)
        encoded = self._encode_pieces(text)
        ends = np.cumsum([len(ids) for ids in encoded])
        ids, truncated = self._fit(np.concatenate(encoded), text, limit)
        return EncodedText(ids, truncated, self._step_positions(ends[1::2], text, limit))

    def _finish_segments(self, text: RenderedText, limit: int) -> EncodedText:
        """Encode a text whose segments are tokenized separately, each cut to its share of the limit.

        A segment without placeholders is the same in every text, and is never cut.
        """
        special = self.adds_special_tokens(text)
        encodings = self._backend.encode_batch_fast(list(text.pieces), add_special_tokens=special)
        with_words = [bool(PLACEHOLDER.search(segment)) for segment in self._spec.text.segments]
        fixed = sum(len(whole.ids) for whole, words in zip(encodings, with_words, strict=True) if not words)
        if fixed and limit <= fixed:
            raise RowError(f"a limit of {limit} tokens leaves no room for text beside {fixed} that are in every text")
        limit -= fixed
        room, first = int(self._spec.text.first_part * limit + 1e-6), True  # 1e-6: rounding of the share
        parts: list[Ids] = []
        truncated = 0
        for whole, words in zip(encodings, with_words, strict=True):
            kept = self._cut(whole, room) if words else whole
            truncated += len(whole.ids) - len(kept.ids)
            parts.append(np.array(kept.ids, dtype=np.int64))
            if words and first:  # the others share the rest evenly
                room, first = (limit - len(kept.ids)) // max(1, with_words.count(True) - 1), False
        ids = np.concatenate(parts)
        return EncodedText(ids, truncated, tap_positions(ids, self._spec.taps))

    def _prompt_tokens(self, text: RenderedText) -> int | None:
        if text.prompt is None:
            return None
        return len(self._backend.encode(text.prompt, add_special_tokens=self.adds_special_tokens(text)).ids)

    def _encode_pieces(self, text: RenderedText) -> list[Ids]:
        special = self.adds_special_tokens(text)
        encodings = self._backend.encode_batch_fast(list(text.pieces), add_special_tokens=special)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def _fit(self, ids: Ids, text: RenderedText, limit: int) -> tuple[Ids, int]:
        """Add the rule's ids before and after the text's own, cut to fit; return them and the number of tokens cut."""
        rule = self._spec.text
        if len(ids) == 0:
            raise RowError("the text has no tokens; expected at least one")
        if text.is_raw:
            return ids[:limit], max(len(ids) - limit, 0)
        ids = np.concatenate([np.array(rule.prepend_ids, dtype=np.int64), ids])
        room = limit - len(rule.append_ids)
        truncated = max(len(ids) - room, 0)
        kept = self._cut_answer(ids, text, room) if truncated and rule.cut == "answer" else ids[:room]
        ids = np.concatenate([kept, np.array(rule.append_ids, dtype=np.int64)])
        if rule.overwrite_last is not None:
            ids[-1] = rule.overwrite_last
        return ids, truncated

    def _cut_answer(self, ids: Ids, text: RenderedText, room: int) -> Ids:
        """Cut tokens off the end of the answer, and keep the text after it, where the reward is read.

        `ids` include the rule's `prepend_ids`. Raises RowError if nothing of the answer would be left.
        """
        answer = text.find_answer() if text.find_answer is not None else None
        if answer is None:
            raise RowError(
                f"the text has {len(ids)} tokens and {room} fit; it cannot be cut, because the answer cannot be "
                "located in it: send a shorter one"
            )
        begin, end = answer
        # Encode again with the tokens' offsets, which `encode_many` leaves out to save time.
        special = self.adds_special_tokens(text)
        offsets = np.array(self._backend.encode(text.text, add_special_tokens=special).offsets)
        before = len(ids) - len(offsets) + int(np.searchsorted(offsets[:, 1], begin, side="right"))
        after = int((offsets[:, 1] > end).sum())
        if room - after <= before:
            raise RowError(
                f"{before + after} tokens besides the answer, and the limit is {room}: nothing of the answer is left; "
                "send a shorter prompt"
            )
        return np.concatenate([ids[: room - after], ids[len(ids) - after :]])

    def _step_positions(self, begins: Ids, text: RenderedText, limit: int) -> Ids:
        """Return where the steps' rewards are read, as indices into the final ids, which include `prepend_ids`.

        `begins` are the indices of the step tokens in the text's own ids before the cut. Raises RowError if there is
        not one for each step, or if the cut would lose one.
        """
        rule, offset = self._spec.text, self._spec.taps[0].offset
        if len(begins) == 0 or text.steps not in (None, len(begins)):
            expected = "at least one" if text.steps is None else f"one for each of the {text.steps} steps"
            raise RowError(
                f"step token {rule.step_token!r}: expected {expected}, found {len(begins)}; "
                "neither the prompt nor a step may hold one, or run into it"
            )
        positions = begins + offset + (0 if text.is_raw else len(rule.prepend_ids))
        room = limit - (0 if text.is_raw else len(rule.append_ids))
        if positions[0] < 0:
            raise RowError(f"step token {rule.step_token!r}: the text begins with it, and no token stands before")
        if lost := int((positions >= room).sum()):
            raise RowError(
                f"{lost} of {len(positions)} steps lie beyond {room} tokens, where the text is cut; "
                "a reward for the rest would not be one for the answer: shorten it"
            )
        return positions


_ALIVE: weakref.WeakSet[Tokenizer] = weakref.WeakSet()


def _forked() -> None:
    # The tokenizing threads do not exist here. The library then works without threads, unless this variable tells it to
    # use them; it would then wait forever.
    if list(_ALIVE) and os.environ.get("TOKENIZERS_PARALLELISM"):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


after_fork(_forked)


def _bytes_of(text: RenderedText) -> int:
    """Return the number of UTF-8 bytes that the tokenizer is given for a text."""
    parts = text.pieces or (text.text, text.pair or "")
    return sum(map(utf8_bytes, parts))


def _in_batches(indices: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Yield the indices in order, in lists whose texts have at most BATCH_BYTES together; a longer text comes alone."""
    some: list[int] = []
    size = 0
    for index in indices:
        if some and size + sizes[index] > BATCH_BYTES:
            yield some
            some, size = [], 0
        some.append(index)
        size += sizes[index]
    if some:
        yield some


@contextmanager
def _at_this_text() -> Iterator[None]:
    """Turn any failure of the library inside the block into a RowError of this text.

    A panic in the library's Rust code is a BaseException, which `except Exception` does not catch: it would end the
    thread or the run.
    """
    try:
        yield
    except (RowError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:200]
        raise RowError(f"the tokenizer failed at this text ({type(error).__name__}: {reason})") from error


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how many tokens of two texts are kept when they share `room` tokens: the longer text is cut first.

    If both have to be cut, each gets half. An odd token goes to the longer text, or to the second of two equally long
    texts.
    """
    if first + second <= room:
        return first, second
    half = room // 2
    if min(first, second) <= half:
        return (first, room - first) if first <= second else (room - second, second)
    return (half, room - half) if first <= second else (room - half, half)
