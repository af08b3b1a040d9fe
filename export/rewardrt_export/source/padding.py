"""The pad token of training: its id if the files determine it, and an error with the choices if they do not.

A head whose position depends on the pad id reads another token if the id is wrong, so a guess could change the reward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from rewardrt.errors import CheckpointError


@dataclass(frozen=True)
class Padding:
    """The pad ids in the config and the tokenizer; an id that no token has is None.

    `borrowed`: the config belongs to an adapter's base, and what training set in it was not saved. `given`: the id that
    the user chose. `unread`: the user chose a pooling rule that needs no pad id.
    """

    tokenizer: Any
    config: int | None
    borrowed: bool = False
    given: int | None = None
    unread: bool = False

    def choose(self, *, required: bool = False) -> tuple[int | None, str | None]:
        """Return the pad id, and a line with the reason if config and tokenizer differ or the user chose.

        None means that there is no pad id; transformers then reads the last token. With `required`, the tokenizer's id
        is used instead of none. Raises CheckpointError if the files allow two readings and the user did not choose.
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
        """Whether an adapter's files leave open what training padded with.

        A base without a pad id cannot be trained in batches, so the tokenizer's was set. Without one, TRL uses EOS.
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
        """Return the value of --pad-token for this id."""
        token = None if token_id is None else self._token(token_id)
        return str(token_id) if token is None or token.strip() != token or not token else f"'{token}'"

    def _token(self, token_id: int) -> str | None:
        try:
            token = self.tokenizer.convert_ids_to_tokens(token_id)
        except (IndexError, OverflowError, TypeError, ValueError):  # no token has this id
            return None
        return token if isinstance(token, str) else None


def read_padding(tokenizer: Any, config: PretrainedConfig, *, borrowed: bool, given: str | None) -> Padding:
    """Read the pad ids of config and tokenizer, and the token or id given by --pad-token. Raises CheckpointError."""
    text = config.get_text_config()  # where transformers' classifiers look; for most models the config itself
    stated = getattr(text if isinstance(text, PretrainedConfig) else config, "pad_token_id", None)
    if stated is not None and (isinstance(stated, bool) or not isinstance(stated, int)):
        raise CheckpointError(f"config.json: pad_token_id {stated!r}; expected the id of a token")
    # No token has a negative id: transformers finds none, and reads the last token, as without a pad id.
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
