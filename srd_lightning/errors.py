"""What a user can put right: one base class, and under it one class per kind of cause.

The command line says these in one paragraph and exits with 2; every other exception is a bug of this library, or of one
that it uses, and keeps its traceback. Each class is also the built-in exception that fits, so ``except ValueError`` and
``except OSError`` go on working.

====================  ==================  ==========================================================================
class                 also                cause
====================  ==================  ==========================================================================
`DataError`           `ValueError`        rows, files of rows, scores from elsewhere
`MissingDataError`    `FileNotFoundError` a file, folder or hub id of data that is not there
`SettingError`        `ValueError`        a setting, or settings that do not go together, or not with the machine
`ModelError`          `ValueError`        a model or tokenizer that cannot do what is asked of it
`ResumeError`         `ValueError`        a checkpoint that this run cannot go on from
`StorageError`        `OSError`           a folder or file that cannot be written, is damaged, full, or in use
`NonFiniteError`      `FloatingPointError` a loss or a gradient that is NaN or infinite
`RankError`           `RuntimeError`      another rank has failed or is gone
====================  ==================  ==========================================================================
"""

from __future__ import annotations


class SRDError(Exception):
    """Base of the errors that a user can put right; the message says what was expected, what came, and what to do."""


class DataError(SRDError, ValueError):
    """Rows, files of rows, or scores that cannot be used as they are."""


class MissingDataError(DataError, FileNotFoundError):
    """A file, folder or hub id of data that is not there."""


class SettingError(SRDError, ValueError):
    """A setting that cannot be, or that does not go with another one or with the machine."""


class ModelError(SRDError, ValueError):
    """A model or a tokenizer that cannot do what is asked of it."""


class ResumeError(SRDError, ValueError):
    """A checkpoint that this run cannot go on from."""


class StorageError(SRDError, OSError):
    """A file or folder that cannot be written or read, is damaged, or belongs to another run."""


class NonFiniteError(SRDError, FloatingPointError):
    """A loss or a gradient is NaN or infinite; all ranks see the same one."""


class RankError(SRDError, RuntimeError):
    """Another rank has failed or is gone."""


def in_one_line(text: object) -> str:
    r"""Return a text, or the message of an error, without its line breaks.

    Example:
        >>> in_one_line("no such\n  file")
        'no such file'
    """
    return " ".join(str(text).split())


OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


def lacks_memory(exception: BaseException) -> bool:
    """Return whether an error says that memory is out."""
    import torch  # not above: `srd --help` needs the errors, and nothing of torch

    if isinstance(exception, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(exception, RuntimeError) and any(words in str(exception).lower() for words in OUT_OF_MEMORY)
