"""The token that training padded with: which id it was, where the files say, and the question where they do not.

A head that is read by the pad id reads another token where the id is another, so a guess would be another reward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from rewardrt.errors import CheckpointError


@dataclass(frozen=True)
class Padding:
    """What each side says of the pad token; ids that no token has are None.

    `borrowed`: the config is the base's of an adapter, and what training set in it was saved nowhere. `unread`: the
    user chose a rule that needs no pad id.
    """

    tokenizer: Any
    config: int | None
    borrowed: bool = False
    given: int | None = None
    unread: bool = False

    def choose(self, *, required: bool = False) -> tuple[int | None, str | None]:
        """Return the id, and a line that says why it is that one where the two sides differ or somebody chose.

        None is no id: transformers reads the last token then. With `required` the tokenizer's id stands in for it.
        Raises CheckpointError where the files allow two readings and nobody chose.
        """
        if self.unread:
            return None, None
        said = f"config.json's is {self._name(self.config)}, the tokenizer's {self._name(self.pad)}"
        if self.given is not None:
            return self.given, f"{self._name(self.given)}, as --pad-token says; {said}"
        if self.borrowed and self._is_open():
            raise CheckpointError(self._question())
        if self.config == self.pad:
            return self.config, None
        if self.config is None and self.pad is not None and (self.borrowed or required):
            return self.pad, f"{self._name(self.pad)}, the tokenizer's; config.json has none"
        if self.pad is None:
            return self.config, None
        kept = f"config.json's {self._name(self.config)}" if self.config is not None else "none, as config.json says"
        return self.config, (
            f"{kept}, which the trained class had; the tokenizer's is {self._name(self.pad)}, taken with --pad-token"
        )

    @property
    def pad(self) -> int | None:
        """The tokenizer's own pad id."""
        found = self.tokenizer.pad_token_id
        return found if isinstance(found, int) else None

    def _is_open(self) -> bool:
        """Whether an adapter's two sides leave open what training padded with.

        A base without a pad id cannot be trained in batches: then the tokenizer's was set. TRL takes EOS without one.
        """
        if self.pad is not None:
            return self.config not in (None, self.pad)
        return self.config is None or self.config != self.tokenizer.eos_token_id

    def _question(self) -> str:
        eos = self.tokenizer.eos_token_id
        trl = self.pad if self.pad is not None else eos
        own = "the tokenizer's" if self.pad is not None else "EOS, as the tokenizer has no pad token"
        by_config = (
            f"--pad-token {self._text(self.config)} if it was trained with the base's config.json as it stands"
            if self.config is not None
            else "--pooling last_mask if it was trained without a pad token"
        )
        by_trl = (
            f"--pad-token {self._text(trl)} if it was trained by TRL's RewardTrainer, which takes {own}"
            if trl is not None
            else "--pad-token TOKEN for the one it was trained with"
        )
        return (
            f"the reward is read by the pad token, and the files allow two: the base's config.json says "
            f"{self._name(self.config)}, the tokenizer {self._name(self.pad)}; say {by_trl}, or {by_config}"
        )

    def _name(self, token_id: int | None) -> str:
        if token_id is None:
            return "none"
        token = self._token(token_id)
        return f"id {token_id}" if token is None else f"{token!r} (id {token_id})"

    def _text(self, token_id: int | None) -> str:
        """What to give --pad-token for this id."""
        token = None if token_id is None else self._token(token_id)
        return str(token_id) if token is None or token.strip() != token or not token else f"'{token}'"

    def _token(self, token_id: int) -> str | None:
        try:
            token = self.tokenizer.convert_ids_to_tokens(token_id)
        except (IndexError, OverflowError, TypeError, ValueError):  # no token has this id
            return None
        return token if isinstance(token, str) else None


def read_padding(tokenizer: Any, config: PretrainedConfig, *, borrowed: bool, given: str | None) -> Padding:
    """Read what config and tokenizer say, and the token or id that --pad-token gives. Raises CheckpointError."""
    text = config.get_text_config()  # transformers' classifiers look there, which is the config itself for most
    stated = getattr(text if isinstance(text, PretrainedConfig) else config, "pad_token_id", None)
    if stated is not None and (isinstance(stated, bool) or not isinstance(stated, int)):
        raise CheckpointError(f"config.json: pad_token_id {stated!r}; expected the id of a token")
    # A negative id is no token's: transformers finds none, and reads the last token, as without an id.
    own = stated if stated is not None and stated >= 0 else None
    return Padding(tokenizer, own, borrowed, None if given is None else _given_id(tokenizer, given))


def _given_id(tokenizer: Any, given: str) -> int:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if given.isascii() and given.isdigit():
        if int(given) in vocabulary.values():
            return int(given)
    elif given in vocabulary:
        return vocabulary[given]
    raise CheckpointError(
        f"--pad-token {given!r}: the tokenizer has no such token; expected one of its {len(vocabulary)}, or an id"
    )
