"""Exceptions of the package. Messages name the thing, what was expected and what was found."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

# Characters of a message that are kept at its ends; values of damaged files can have any length.
_BEGIN, _END = 900, 400


class SemanticAnomalyError(Exception):
    """Base class of all errors of this package; commands print it as one line.

    The middle of a message of more than 1300 characters is left out.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > _BEGIN + _END:
            text = f"{text[:_BEGIN]} ... {text[-_END:]}"
        return text


class InputError(SemanticAnomalyError):
    """Invalid input of the user; commands end with exit code 2."""


class SettingsError(InputError):
    """A setting is unknown, of the wrong type or out of bounds."""


class UnknownNameError(InputError):
    """A name is not one of the known ones; the message suggests the closest."""

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        close = get_close_matches(name, known, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        listed = ", ".join(known) or "none"
        super().__init__(f"unknown {what} '{name}'{hint}; expected one of: {listed}")


class ImageError(InputError):
    """An image cannot be read, or has the wrong shape or type."""


class SourceError(InputError):
    """A folder, video or bag cannot be read or has no frames."""


class BackboneError(InputError):
    """A network cannot be loaded: missing, incomplete, damaged or unsupported."""


class ModelOutputError(SemanticAnomalyError):
    """The output of a network is not finite or has the wrong shape."""


class ArtefactError(InputError):
    """A file or folder of results is missing, damaged, cannot be written or does not match."""


class IndexFormatError(ArtefactError):
    """An index folder is incomplete, damaged, altered or of another format."""


class MismatchError(ArtefactError):
    """Two things that must agree differ, such as an index and the running embedder."""

    def __init__(self, what: str, expected: object, found: object, hint: str = "") -> None:
        self.expected = expected
        self.found = found
        tail = f"; {hint}" if hint else ""
        super().__init__(f"{what}: expected {expected}, found {found}{tail}")


class IndexMismatchError(MismatchError):
    """The index was built with another backbone, input size or region of interest."""


class CalibrationError(ArtefactError):
    """A calibration is missing, damaged, of another index or too small for the target rate."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, cut at 200 characters, or its class name."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip()[:200] if lines else type(error).__name__
