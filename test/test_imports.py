"""The import rules of the house, and what may not be found in it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "semantic_anomaly"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [file.relative_to(PACKAGE).as_posix() for file in FILES]

# Who alone may import what; a folder ends in a slash.
SEGMENTATION = ("segmentation_models.py", "segmentation_loading.py", "segmentation_tokens.py")
ROOMS = {
    # The search multiplies with the backbone's threads: a second library's would stand in its way.
    "torch": ("embedding.py", "network.py", *SEGMENTATION, "exact_search.py"),
    "transformers": ("embedding.py", "network.py", *SEGMENTATION[:2]),
    "hnswlib": ("index.py", "growing_graph.py"),
    "rosbags": ("bags.py", "synthetic/export.py"),
    "rclpy": ("ros/",),
    "launch": (),
    "launch_ros": (),
    "cv_bridge": ("ros/",),
    "matplotlib": ("evaluation/",),
    "sklearn": ("evaluation/",),
    "PIL": ("evaluation/",),
    "ray": ("fleet.py",),
    "openai": ("evaluation/",),
}
# What may be imported inside functions only: files that import it remain cheap to import.
LAZY = ("matplotlib", "sklearn", "PIL", "rosbags", "ray", "openai")
HEAVY = ("torch", "transformers", "cv2", "rclpy", "hnswlib", "matplotlib", "sklearn", "rosbags")
FORBIDDEN_MODULES = ("pickle", "cPickle", "dill", "joblib", "shelve", "marshal")
ROS_SUFFIXES = ("_msgs", "_srvs", "_interfaces")


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Yield the top name of everything imported, and whether importing the module does it."""
    deferred = set()
    for node in ast.walk(tree):
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if typing_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            deferred |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and node.args:
            # importlib.import_module("x") and our own wrapper of it.
            called, first = ast.unparse(node.func), node.args[0]
            if called.endswith(("import_module", "extras.load")) and isinstance(
                first, ast.Constant
            ):
                names = [str(first.value)]
        yield from ((name.partition(".")[0], id(node) not in deferred) for name in names)


def allowed(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name.startswith(r) if r.endswith("/") else name == r for r in rooms)


def test_the_rules_see_what_they_must() -> None:
    code = (
        "import torch.nn\ndef f():\n    from sklearn import metrics\n"
        "if TYPE_CHECKING:\n    import rosbags\nextras.load('PIL.Image')\n"
    )
    found = {("torch", True), ("sklearn", False), ("rosbags", False), ("PIL", True)}
    assert set(imports(ast.parse(code))) == found


@pytest.mark.parametrize("name", NAMES)
def test_rooms_import_only_what_is_theirs(name: str) -> None:
    tree = ast.parse((PACKAGE / name).read_text(encoding="utf-8"))
    for module, at_import in imports(tree):
        rooms = ("ros/",) if module.endswith(ROS_SUFFIXES) else ROOMS.get(module)
        assert rooms is None or allowed(name, rooms), f"{name} may not import {module}"
        assert not (at_import and module in LAZY), f"{name} imports {module} before it is needed"
        assert module not in FORBIDDEN_MODULES, f"{name}: {module} executes what it reads"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_executes_from_data(name: str) -> None:
    for node in ast.walk(ast.parse((PACKAGE / name).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system"), called
        for keyword in node.keywords:
            value = ast.unparse(keyword.value)
            assert (keyword.arg, value) != ("allow_pickle", "True"), f"{name}: {called}"
            assert (keyword.arg, value) != ("shell", "True"), f"{name}: {called}"
            assert keyword.arg != "trust_remote_code" or value == "False", f"{name}: {called}"
        if called in ("np.load", "numpy.load"):
            named = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert named.get("allow_pickle") == "False", f"{name}: say allow_pickle=False"


def test_files_are_short_and_named_for_what_they_hold() -> None:
    long = {n: count for n, f in zip(NAMES, FILES, strict=True)
            if (count := len(f.read_text(encoding="utf-8").splitlines())) > 300}  # fmt: skip
    assert not long
    assert not [name for name in NAMES if Path(name).stem in ("utils", "util", "helpers", "misc")]


@pytest.mark.parametrize(
    "module",
    [
        "semantic_anomaly",
        "semantic_anomaly.errors",
        "semantic_anomaly.settings",
        "semantic_anomaly.structures",
        "semantic_anomaly.calibration",
        "semantic_anomaly.cli",
        "semantic_anomaly.cli.evaluate",
        "semantic_anomaly.cli.demo",
    ],
)
def test_importing_is_cheap(module: str) -> None:
    # calibration describes regions, which are drawn with OpenCV.
    heavy = [name for name in HEAVY if (module, name) != ("semantic_anomaly.calibration", "cv2")]
    code = (
        f"import sys; before = set(sys.modules); import {module}; "
        f"print(*sorted(set(sys.modules) - before & set({heavy!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & set(heavy)
