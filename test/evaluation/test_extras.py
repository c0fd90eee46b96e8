"""Optional packages."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from semantic_anomaly.errors import InputError, SemanticAnomalyError
from semantic_anomaly.evaluation import extras


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(SemanticAnomalyError, match=r"scikit-learn.*\[report\]") as caught:
        extras.require("sklearn.metrics")
    assert not isinstance(caught.value, InputError), "nothing is wrong with the input"
    assert isinstance(extras.load("matplotlib.figure"), ModuleType)
