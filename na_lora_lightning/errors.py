"""Errors that a user can cause and fix.

Each message is one sentence that names the thing, the reason and the remedy. The command line prints it
without a traceback and exits with status 2.
"""


class NALoRAError(ValueError):
    """Base of every error that this package raises on purpose."""


class ConfigurationError(NALoRAError):
    """An option has a value that cannot work, alone or together with another."""


class DiscoveryError(NALoRAError):
    """The gates of a model, or the LoRA rows that belong to them, cannot be determined."""


class PlainLoRAWarning(UserWarning):
    """Something that was to be trained nonlinearity-aware trains as plain LoRA does."""


class ViewWarning(UserWarning):
    """Something of what was to be shown is not, and training goes on."""


class DataError(NALoRAError):
    """A data set, or one record of it, cannot be used."""


class UpdateError(NALoRAError):
    """The update of a gate's LoRA rows cannot be reached (optimizer, strategy, or frozen parameters)."""


class ImageError(DataError):
    """An image of a record is missing, broken, or larger than is allowed."""


class CheckpointError(NALoRAError):
    """A checkpoint is missing, damaged, or cannot be written."""


class NonFiniteError(NALoRAError):
    """A loss, activation or weight is NaN or infinite, so training cannot go on."""


def one_line(error: BaseException) -> str:
    """The first sentence or line of an error's message, to be put inside another sentence."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return first.split(". ")[0].rstrip(".:")
