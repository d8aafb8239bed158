"""The errors that a user of Ascent can meet.

An error is one sentence that says what happened, where, what was expected, and what to do. The command line prints
it without a traceback (``--debug`` shows one) and exits with ``exit_code``.
"""

from __future__ import annotations


class LabError(Exception):
    """Base of every error whose message is written for the user."""

    exit_code = 1

    def __str__(self) -> str:
        return super().__str__().replace("'?.", "'?")  # a hint that asks ends the sentence


class RecipeError(LabError):
    """A recipe that cannot be read, or asks for something impossible."""

    exit_code = 2


class DataError(LabError):
    """A manifest, file or row that is not what it claims to be."""

    exit_code = 3


class LayoutError(LabError):
    """Degrees of parallelism, batch and devices that do not fit together."""

    exit_code = 2


class CheckpointError(LabError):
    """A checkpoint that is missing, truncated or made for something else."""

    exit_code = 4


class RunError(LabError):
    """A run that cannot be found, launched, stopped or resumed, or that failed."""

    exit_code = 5
