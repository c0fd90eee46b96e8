"""The errors of the package; each composes its own sentence from what was expected and found."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SemanticAnomalyError(Exception):
    """Any error that this package raises on purpose; commands print it as one line."""


class InputError(SemanticAnomalyError):
    """Something that the user gave cannot be used; commands end with exit code 2."""


class SettingsError(InputError):
    """A setting is unknown, of the wrong type or out of its bounds."""


class UnknownNameError(InputError):
    """A name is not one of those there are."""

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        self.name = name
        self.known = sorted(known)
        close = get_close_matches(name, self.known, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        listed = ", ".join(self.known) if self.known else "none"
        super().__init__(f"unknown {what} '{name}'{hint}; expected one of: {listed}")


class ImageError(InputError):
    """An image cannot be read or is not what was expected."""


class SourceError(InputError):
    """A folder, video or bag holds no usable frames."""


class BackboneError(InputError):
    """A backbone folder or hub id cannot be loaded whole and unaltered."""


class ModelOutputError(SemanticAnomalyError):
    """A network produced something that is not finite or has another shape."""


class ArtefactError(InputError):
    """An artefact on disk is missing, damaged or does not belong to what is running."""


class IndexFormatError(ArtefactError):
    """An index folder is incomplete, truncated, tampered with or of another format."""


class MismatchError(ArtefactError):
    """Two things that must agree do not, such as an index and the running embedder."""

    def __init__(self, what: str, expected: object, found: object, hint: str = "") -> None:
        self.expected = expected
        self.found = found
        tail = f"; {hint}" if hint else ""
        super().__init__(f"{what}: expected {expected}, found {found}{tail}")


class IndexMismatchError(MismatchError):
    """The index was made by another backbone, input size or region than is running."""


class CalibrationError(ArtefactError):
    """A calibration is missing, damaged, of another index or too small for the rate asked."""
