"""The packages that only reports need, imported when a report is made."""

from __future__ import annotations

import importlib
from types import ModuleType

from semantic_anomaly.errors import SemanticAnomalyError

_PACKAGES = {"sklearn": "scikit-learn", "PIL": "pillow"}


class MissingPackageError(SemanticAnomalyError):
    """A package of an extra is not installed."""


def require(*modules: str, extra: str = "report") -> None:
    """Refuse early, before hours of work, when a package of an extra is missing.

    Raises:
        MissingPackageError: naming package and extra.
    """
    for name in modules:
        load(name, extra)


def load(name: str, extra: str = "report") -> ModuleType:
    """Import a module of an extra, report or vlm.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = _PACKAGES.get(name.partition(".")[0], name)
        raise MissingPackageError(
            f"this needs the package '{package}', which cannot be imported ({error}); "
            f"install it with: pip install 'semantic_anomaly[{extra}]'"
        ) from error
