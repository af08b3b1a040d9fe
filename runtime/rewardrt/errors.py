"""Every error that RewardRT raises on purpose.

    RewardRTError
    ├── MissingExtraError     an optional package is not installed
    ├── BundleError           the folder is not a bundle this runtime can trust
    ├── ProviderError         the execution provider that was asked for is not the one obtained
    ├── RowError              one input cannot be scored (the others can)
    ├── InferenceError        the graph failed, or gave a value that is not a number
    ├── HubError              the Hugging Face Hub cannot be reached, or refuses what was asked of it
    ├── ServerError           a reward server gives no answer, refuses the request, or is not the one expected
    ├── WorkerError           a process that was to be measured could not load its model, or not score with it
    └── ExportError
        ├── CheckpointError   the checkpoint is not a reward model that can be exported exactly
        ├── TraceError        the backbone could not be turned into a graph
        └── CertificateError  the exported bundle does not give the torch model's rewards

A message says what was expected, what was found and what to do, on one line.
"""

from __future__ import annotations

from rewardrt.display import visible


class RewardRTError(Exception):
    """Base class of all errors that RewardRT raises on purpose.

    Its message is one line, whatever texts, names and other libraries' words were put into it.
    """

    def __str__(self) -> str:
        return visible(super().__str__())


class MissingExtraError(RewardRTError):
    """An optional package is not installed; the message ends with the command that installs it."""


class BundleError(RewardRTError):
    """The folder is not a bundle, is damaged, or was written for another format version."""


class ProviderError(RewardRTError):
    """The execution provider that was asked for could not be obtained; the message says why and what mends it."""


class RowError(RewardRTError):
    """One input cannot be scored: its fields, types, roles or characters are not what the model can take."""


class InferenceError(RewardRTError):
    """The graph failed, or gave a reward that is not a finite number."""


class HubError(RewardRTError):
    """The Hugging Face Hub cannot be reached, or refuses what was asked of it: a name, a revision, a token."""


class ServerError(RewardRTError):
    """A reward server gives no answer, refuses a request, or serves another bundle than was expected."""


class WorkerError(RewardRTError):
    """A process that was to be measured could not load its model, or not score with it; the message is its own."""


class ExportError(RewardRTError):
    """Base class of what stops an export."""


class CheckpointError(ExportError):
    """The checkpoint is damaged, incomplete, ambiguous, or of a kind that cannot be exported exactly."""


class TraceError(ExportError):
    """The backbone could not be turned into one graph."""


class CertificateError(ExportError):
    """The exported bundle does not reproduce the torch model within the tolerance."""


class TruncationWarning(UserWarning):
    """A text was longer than the model's limit and was cut; calls that return bare numbers say so this way."""
