"""Every error that RewardRT raises on purpose.

    RewardRTError
    ├── MissingExtraError     an optional package is not installed
    ├── BundleError           the folder is not a bundle this runtime can trust
    ├── ProviderError         the requested execution provider could not be obtained
    ├── RowError              one input cannot be scored (the others can)
    ├── InferenceError        the graph failed, or gave a reward that is not a finite number
    ├── HubError              the Hugging Face Hub cannot be reached, or refuses a request
    ├── ServerError           a reward server gives no answer, refuses the request, or is not the one expected
    ├── WorkerError           a process started by `rewardrt bench` could not load its model or score with it
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

    The message is always one line: control characters in quoted texts, names or other libraries' messages are escaped.
    """

    def __str__(self) -> str:
        return visible(super().__str__())


class MissingExtraError(RewardRTError):
    """An optional package is not installed; the message ends with the command that installs it."""


class BundleError(RewardRTError):
    """The folder is not a bundle, is damaged, or was written for another format version."""


class ProviderError(RewardRTError):
    """The requested execution provider could not be obtained; the message says why and how to fix it."""


class RowError(RewardRTError):
    """One input cannot be scored: the model does not accept its fields, types, roles or characters."""


class InferenceError(RewardRTError):
    """The graph failed, or gave a reward that is not a finite number."""


class HubError(RewardRTError):
    """The Hugging Face Hub cannot be reached, or refuses a request: an unknown name or revision, or a missing token."""


class ServerError(RewardRTError):
    """A reward server gives no answer, refuses a request, or serves a different bundle than was expected."""


class WorkerError(RewardRTError):
    """A process of `rewardrt bench` could not load its model or score with it; the message comes from that process."""


class ExportError(RewardRTError):
    """Base class of the errors that stop an export."""


class CheckpointError(ExportError):
    """The checkpoint is damaged, incomplete, ambiguous, or of a kind that cannot be exported exactly."""


class TraceError(ExportError):
    """The backbone could not be turned into one graph."""


class CertificateError(ExportError):
    """The exported bundle does not reproduce the torch model within the tolerance."""


class TruncationWarning(UserWarning):
    """A text was longer than the model's limit and was cut. Issued by calls that return only numbers."""
