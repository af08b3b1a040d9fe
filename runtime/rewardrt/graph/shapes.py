"""The input shapes that a TensorRT engine is built for, and the few sizes that batches are padded to.

An engine accepts every shape within its profile, but makes kernels for each new shape that it meets; with texts of all
lengths it would make some all the time. So the number of rows and of tokens are rounded up to one of a few sizes. The
added tokens and rows are padding, and their results are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

MOST_ROWS = 64
MOST_TOKENS = 131_072  # of all rows together
_SMALLEST = 16  # tokens


@dataclass(frozen=True)
class Profile:
    """The range of an engine's input shapes: 1 to `rows` texts of 1 to `tokens` tokens each."""

    rows: int
    tokens: int

    @classmethod
    def of(cls, max_length: int) -> Profile:
        """Return the profile for a model whose texts are cut at `max_length` tokens."""
        return cls(max(1, min(MOST_ROWS, MOST_TOKENS // max_length)), max_length)

    @property
    def best(self) -> tuple[int, int]:
        """The (rows, tokens) for which the engine's kernels are optimised."""
        return min(8, self.rows), min(256, self.tokens)

    def bucket(self, rows: int, tokens: int) -> tuple[int, int]:
        """Return the shape within the profile to which a batch of this shape is padded."""
        return min(_power_of_two(rows), self.rows), min(_half_step(tokens), self.tokens)

    def buckets(self, batch_tokens: int) -> list[tuple[int, int]]:
        """Return the padded shapes of all batches of at most `batch_tokens` tokens, largest first.

        A batch of one text may have more tokens than `batch_tokens`.
        """
        lengths = [1, *(size + 1 for size in _sizes(self.tokens) if size < self.tokens)]  # each bucket's shortest
        counts = [1, *((1 << power) + 1 for power in range(self.rows.bit_length()) if 1 << power < self.rows)]
        found = {
            self.bucket(rows, tokens)
            for rows in counts
            for tokens in lengths
            if rows == 1 or rows * tokens <= batch_tokens
        }
        return sorted(found, key=lambda shape: (-shape[0] * shape[1], shape))

    def describe(self) -> str:
        """Describe the range for people."""
        return f"1-{self.rows} texts of 1-{self.tokens:,} tokens"


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _half_step(number: int) -> int:
    """Return the smallest of 16, 24, 32, 48, 64, 96, ... that is at least `number`."""
    if number <= _SMALLEST:
        return _SMALLEST
    whole = _power_of_two(number)
    return whole // 4 * 3 if number <= whole // 4 * 3 else whole


def _sizes(most: int) -> list[int]:
    sizes = [_SMALLEST]
    while sizes[-1] < most:
        sizes.append(_half_step(sizes[-1] + 1))
    return sizes
