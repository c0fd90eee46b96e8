"""Optional packages, imported on use."""

from __future__ import annotations

import importlib
from types import ModuleType

from semantic_anomaly.errors import SemanticAnomalyError

_PACKAGES = {"sklearn": "scikit-learn", "PIL": "pillow"}


class MissingPackageError(SemanticAnomalyError):
    """A package of an extra is not installed."""


def require(*modules: str, extra: str = "report") -> None:
    """Check before a long run that packages of an extra can be imported.

    Raises:
        MissingPackageError: a package is not installed; names package and extra.
    """
    for name in modules:
        load(name, extra)


def load(name: str, extra: str = "report") -> ModuleType:
    """Import a module of an extra, report, vlm or fleet.

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
