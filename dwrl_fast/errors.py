"""Errors that a user can correct. The commands print them without a traceback; any other exception is a bug."""

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


class LabelError(TemplateError):
    """A label of the template is not one token of its own where it is read."""


class ModelError(UserError):
    """The model cannot be loaded, or cannot do what is asked of it."""


class NotFiniteError(UserError):
    """A logit, loss or gradient was not a number; nothing was trained with it."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, altered, or belongs to another run."""


class SamplerError(UserError):
    """An engine that writes thoughts failed, or is not one that can be trusted with them."""


class UntrainedError(UserError):
    """A run ended without having trained anything."""

    status = 3


class UnfitError(UserError):
    """An examined set-up has a fault with which it should not be trained."""

    status = 4
