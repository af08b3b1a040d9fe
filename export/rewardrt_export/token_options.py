"""Options of the command line for a model whose reward is a function of tokens' logits. Light to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

LogitFunction = Literal["logit", "difference", "sigmoid", "softmax", "log-odds", "expectation"]
LOGIT_FUNCTIONS: tuple[LogitFunction, ...] = get_args(LogitFunction)


@dataclass(frozen=True)
class TokenOptions:
    """The options of `rewardrt export` with these names; None and "" leave the choice to the family."""

    tokens: str = ""
    function: LogitFunction | None = None
    template: str = ""
    close: str = ""
    instruction: str = ""

    @property
    def given(self) -> list[str]:
        """The names of the options that were given."""
        return [f"--{name}" for name, value in vars(self).items() if value]


def encodable(text: str) -> bool:
    """Whether a text can be written as UTF-8; a command line may contain lone surrogates."""
    return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in text)
