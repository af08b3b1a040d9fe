"""What the command line says of a model whose reward is a function of tokens' logits. Light to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

LogitFunction = Literal["logit", "difference", "sigmoid", "softmax", "log-odds", "expectation"]
LOGIT_FUNCTIONS: tuple[LogitFunction, ...] = get_args(LogitFunction)


@dataclass(frozen=True)
class TokenOptions:
    """None and "" leave it to the family; the fields are the options of `rewardrt export`."""

    tokens: str = ""
    function: LogitFunction | None = None
    template: str = ""
    close: str = ""
    instruction: str = ""

    @property
    def given(self) -> list[str]:
        """The options that say something."""
        return [f"--{name}" for name, value in vars(self).items() if value]


def encodable(text: str) -> bool:
    """Whether a text can be written as UTF-8: a command line may bring halves of characters."""
    return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in text)
