"""Package semantic_anomaly for colcon (ament_python) and pip."""

import re
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

package_name = "semantic_anomaly"
init = Path(__file__).with_name(package_name) / "__init__.py"
version = re.search(r'__version__ = "([^"]+)"', init.read_text(encoding="utf-8")).group(1)

setup(
    name=package_name,
    version=version,
    packages=find_packages(include=[package_name, f"{package_name}.*"]),
    package_data={package_name: ["py.typed", "backbones/*/*", "evaluation/*.j2"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{package_name}"]),
        (f"share/{package_name}", ["package.xml"]),
        (f"share/{package_name}/launch", glob("launch/*.launch.py")),
        (f"share/{package_name}/config", glob("config/*")),
    ],
    python_requires=">=3.10",
    install_requires=[
        "setuptools",
        "hnswlib>=0.8.0",
        # Reads mcap files that lack their end; rosbags needs the index there.
        "mcap>=1.3",
        "numpy>=1.22",
        "opencv-python-headless>=4.8",
        "pyyaml",
        "rosbags>=0.11",
        "safetensors>=0.4",
        "torch>=2.2",
        "tqdm",
        "transformers>=4.56",
    ],
    extras_require={
        # Runs convolutional backbones two to three times faster on CPUs.
        "cpu": ["openvino>=2026.0"],
        "ros": [
            "ros-rclpy[fastrtps]",
            "ros-builtin-interfaces",
            "ros-diagnostic-msgs",
            "ros-geometry-msgs",
            "ros-lifecycle-msgs",
            "ros-rcl-interfaces",
            "ros-sensor-msgs",
            "ros-std-msgs",
            "ros-std-srvs",
            "ros-visualization-msgs",
        ],
        "report": ["jinja2", "matplotlib", "scikit-learn", "scipy"],
        "vlm": ["openai"],
        "fleet": ["ray>=2.40"],
        "notebook": ["ipykernel", "nbclient", "nbformat"],
        "docs": ["mkdocs-material"],
        "test": ["hypothesis>=6", "mypy", "pytest>=7", "ruff", "types-PyYAML", "types-tqdm"],
    },
    zip_safe=False,
    maintainer="semantic_anomaly maintainers",
    maintainer_email="maintainers@semantic-anomaly.invalid",
    description="Semantic anomaly detection for cameras: ROS 2 lifecycle node and tools.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    entry_points={
        "console_scripts": [
            "semantic-anomaly = semantic_anomaly.cli:main",
            "anomaly_node = semantic_anomaly.ros.node:main",
            "source_player = semantic_anomaly.ros.player:main",
            "result_recorder = semantic_anomaly.ros.recorder:main",
        ],
    },
)
