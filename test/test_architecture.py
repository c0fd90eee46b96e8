"""The import order of the rooms, and what must not be in the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "semantic_anomaly"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [file.relative_to(PACKAGE).as_posix() for file in FILES]
# Tests make bad files on purpose.
SCRIPTS = [
    file.relative_to(ROOT).as_posix()
    for folder in ("semantic_anomaly", "tools", "benchmarks", "launch")
    for file in sorted((ROOT / folder).rglob("*.py"))
]

# A room imports only rooms with a smaller rank, and itself.
BASE = {"errors": 0, "structures": 1, "storage": 1, "linalg": 1, "settings_schema": 2, "stages": 1}
BASE |= {"timing": 1, "stamps": 1, "settings": 3, "roi": 4}
ROOMS = ("io", "embedding", "segmentation", "index", "scoring", "calibration", "detection")
ROOMS += ("offline", "synthetic", "evaluation", "fleet", "review", "ros", "demo", "cli")
RANK = {**BASE, **{room: 10 + number for number, room in enumerate(ROOMS)}}
# Narrower than the order.
SYNTHETIC_SEES = {*BASE, "io", "synthetic"}
EVALUATION_IN_ROS = ("ros/recorder.py",)
# Third-party packages, and the files or rooms that may import them.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "torch": ("embedding/", "segmentation/", "index/", "linalg.py"),
    "transformers": ("embedding/", "segmentation/"),
    "openvino": ("embedding/execution.py",),
    "hnswlib": ("index/hnsw.py",),
    "rosbags": ("io/bags.py", "synthetic/export.py"),
    "mcap": ("io/bag_files.py",),
    "apsw": ("io/bag_files.py",),
    "zstandard": ("io/bag_files.py",),
    "rclpy": ("ros/",),
    "cv_bridge": ("ros/",),
    "matplotlib": ("evaluation/",),
    "sklearn": ("evaluation/",),
    "PIL": ("evaluation/",),
    "openai": ("evaluation/",),
    "ray": ("fleet/",),
    "launch": (),
    "launch_ros": (),
}
# Imported inside functions only.
LAZY = ("matplotlib", "sklearn", "PIL", "rosbags", "ray", "openai", "openvino")
HEAVY = ("torch", "transformers", "cv2", "rclpy", "hnswlib", "matplotlib", "sklearn", "rosbags")
FORBIDDEN_MODULES = ("pickle", "cPickle", "dill", "joblib", "shelve", "marshal")
ROS_SUFFIXES = ("_msgs", "_srvs", "_interfaces")


def imports(tree: ast.Module) -> Iterator[tuple[str, bool]]:
    """Yield every imported module, and whether importing the file imports it."""
    deferred = set()
    for node in ast.walk(tree):
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if typing_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            deferred |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            modules = [module]
            if module == "semantic_anomaly":
                modules = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args:
            # importlib.import_module("x") and our wrapper of it.
            called, first = ast.unparse(node.func), node.args[0]
            if called.endswith(("import_module", "extras.load")) and isinstance(
                first, ast.Constant
            ):
                modules = [str(first.value)]
        yield from ((module, id(node) not in deferred) for module in modules)


def rooms_of(tree: ast.Module) -> Iterator[str]:
    """Yield the rooms that a file imports from."""
    for module, _ in imports(tree):
        parts = module.split(".")
        if parts[0] == "semantic_anomaly" and len(parts) > 1 and parts[1] in RANK:
            yield parts[1]


def test_imports_are_recognised() -> None:
    code = (
        "import torch.nn\ndef f():\n    from sklearn import metrics\n"
        "if TYPE_CHECKING:\n    import rosbags\nextras.load('PIL.Image')\n"
        "from semantic_anomaly import roi, __version__\nfrom semantic_anomaly.ros.node import N\n"
    )
    expected = {("torch.nn", True), ("sklearn", False), ("rosbags", False), ("PIL.Image", True)}
    expected |= {("semantic_anomaly.roi", True), ("semantic_anomaly.__version__", True)}
    tree = ast.parse(code)
    assert set(imports(tree)) == expected | {("semantic_anomaly.ros.node", True)}
    assert set(rooms_of(tree)) == {"roi", "ros"}


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("__init__.py", "__main__.py")])
def test_rooms_import_rooms_above_them(name: str) -> None:
    room = Path(name).parts[0].removesuffix(".py")
    for imported in rooms_of(ast.parse((PACKAGE / name).read_text(encoding="utf-8"))):
        assert imported == room or RANK[imported] < RANK[room], f"{name} imports {imported}/"
        assert room != "synthetic" or imported in SYNTHETIC_SEES, f"{name} imports {imported}/"
        if room == "ros" and imported == "evaluation":
            assert name in EVALUATION_IN_ROS, f"{name} imports evaluation/"
        assert (room, imported) != ("cli", "ros"), f"{name} imports ros/"


def test_every_room_is_in_the_order() -> None:
    rooms = {Path(name).parts[0].removesuffix(".py") for name in NAMES}
    assert rooms - {"__init__", "__main__"} <= set(RANK)


@pytest.mark.parametrize("name", NAMES)
def test_third_party_packages_stay_in_their_rooms(name: str) -> None:
    tree = ast.parse((PACKAGE / name).read_text(encoding="utf-8"))
    for module, at_import in imports(tree):
        top = module.partition(".")[0]
        places = ("ros/",) if top.endswith(ROS_SUFFIXES) else ONLY_IN.get(top)
        assert places is None or name.startswith(places), f"{name} may not import {top}"
        assert not (at_import and top in LAZY), f"{name} imports {top} before it is needed"
        assert top not in FORBIDDEN_MODULES, f"{name}: {top} executes what it reads"


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_executes_from_data(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    modules = {module.partition(".")[0] for module, _ in imports(tree)}
    assert modules.isdisjoint(FORBIDDEN_MODULES), f"{name}: it executes what it reads"
    for node in ast.walk(tree):
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


def test_files_are_named_for_what_they_hold() -> None:
    assert not [n for n in NAMES if Path(n).stem in ("utils", "util", "helpers", "misc", "common")]


@pytest.mark.parametrize(
    "module",
    [
        "semantic_anomaly",
        "semantic_anomaly.errors",
        "semantic_anomaly.settings",
        "semantic_anomaly.structures",
        "semantic_anomaly.cli",
        "semantic_anomaly.cli.evaluate",
        "semantic_anomaly.cli.demo",
    ],
)
def test_importing_is_cheap(module: str) -> None:
    code = (
        f"import sys; before = set(sys.modules); import {module}; "
        f"print(*sorted(set(sys.modules) - before & set({HEAVY!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & set(HEAVY)
