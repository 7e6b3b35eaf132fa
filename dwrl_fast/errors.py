"""Errors that a user can correct. The commands print them without a traceback; any other exception is a bug. And the
end of a command by a signal.
"""

import signal
from typing import ClassVar


class UserError(ValueError):
    """Something that the user gave is wrong. The message says what, where, and what to do.

    status: the exit status of a command that it ends.
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
    """A label of the template is not one token of its own where it is read."""


class ModelError(UserError):
    """The model cannot be loaded, or cannot do what is asked of it."""


class NotFiniteError(UserError):
    """A logit, loss or gradient was not a number; nothing was trained with it."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, altered, or belongs to another run."""


class UnwrittenError(CheckpointError):
    """The disk did not take a checkpoint. Those before it are as they were, and so is the run."""


class SamplerError(UserError):
    """An engine that writes thoughts failed, or is not one that can be trusted with them."""


class UntrainedError(UserError):
    """A run ended without having trained anything."""

    status = 3


class UnfitError(UserError):
    """An examined set-up has a fault with which it should not be trained."""

    status = 4


class Stopped(KeyboardInterrupt):
    """A signal asked the command to end. saved: everything up to here was saved before it was raised.

    status: the exit status of the command, as a shell gives it for the signal.
    """

    def __init__(self, number: int, *, saved: bool = False):
        super().__init__("interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}")
        self.status, self.saved = 128 + number, saved
