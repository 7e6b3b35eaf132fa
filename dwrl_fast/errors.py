"""Errors that a user can correct, and the end of a command by a signal. The commands print these errors without a
traceback; any other exception is a bug.
"""

import signal
from typing import ClassVar


class UserError(ValueError):
    """Something that the user gave is wrong. The message says what, where, and what to do.

    status: the exit status of a command that ends with this error.
    """

    status: ClassVar[int] = 2


class ConfigError(UserError):
    """An option, or a combination of options, is wrong."""


class DataError(UserError):
    """A data file is unreadable, malformed, or has no usable row."""


class TemplateError(UserError):
    """The chat template, the tokenizer and the dialog do not fit together."""


class OverrunError(TemplateError):
    """The chat template takes more time or memory than any conversation does."""


class LabelError(TemplateError):
    """A label of the template is not exactly one token at the position where it is read."""


class ModelError(UserError):
    """The model cannot be loaded, or cannot do what is asked of it."""


class NotFiniteError(UserError):
    """A logit, loss or gradient was not finite. It was not used for training."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, altered, or belongs to another run."""


class UnwrittenError(CheckpointError):
    """A checkpoint could not be written. Earlier checkpoints and the run itself are unchanged."""


class SamplerError(UserError):
    """An engine that samples thoughts failed, or its settings would give wrong thoughts."""


class UntrainedError(UserError):
    """A run ended without having trained anything."""

    status = 3


class UnfitError(UserError):
    """An examined setup has a fault that must be corrected before training."""

    status = 4


class Stopped(KeyboardInterrupt):
    """A signal asked the command to end. saved: whether the state was saved before the exception was raised.

    status: the exit status of the command, as a shell reports it for the signal.
    """

    def __init__(self, number: int, *, saved: bool = False):
        super().__init__("interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}")
        self.status, self.saved = 128 + number, saved
