"""What a person can mend. The command line prints these without a traceback; everything else is a bug of ours."""

from typing import ClassVar


class UserError(ValueError):
    """Something the user gave is wrong. The message says what, where, and what to do.

    status: what a command that it ends exits with.
    """

    status: ClassVar[int] = 2


class ConfigError(UserError):
    """An option, or a combination of options, is wrong."""


class DataError(UserError):
    """A data file is unreadable, malformed, or has no usable row."""


class TemplateError(UserError):
    """The chat template, the tokenizer and the dialog do not fit together."""


class ModelError(UserError):
    """The model cannot be loaded, or cannot do what is asked of it."""


class NotFiniteError(UserError):
    """A logit, loss or gradient was not a number; nothing was trained with it."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, altered, or belongs to another run."""


class UntrainedError(UserError):
    """A run came to its end, and nothing was trained in it."""

    status = 3
