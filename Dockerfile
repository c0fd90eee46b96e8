# Not built yet: written from the documentation of ROS 2, rosdep and colcon.
# Build: docker build -t semantic_anomaly .
# Run:   docker run --rm --net=host --ipc=host -v "$PWD/index:/data/index:ro" semantic_anomaly index:=/data/index image_topic:=/camera/image_raw
FROM ros:jazzy
SHELL ["/bin/bash", "-c"]
# Where PyTorch's CPU wheels are; without it, CUDA builds are downloaded.
ARG PIP_EXTRA_INDEX_URL
# Ubuntu 24.04 protects its Python from pip; a container needs no protection.
ENV HF_HUB_OFFLINE=1 HNSWLIB_NO_NATIVE=1 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1
ENV FASTDDS_BUILTIN_TRANSPORTS=LARGE_DATA
WORKDIR /ros_ws
COPY package.xml constraints.txt src/semantic_anomaly/
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ python3-dev python3-pip \
    && rosdep update --rosdistro jazzy \
    && rosdep install --from-paths src --ignore-src --rosdistro jazzy --dependency-types exec --skip-keys rviz2 -y \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m pip install \
    -r <(grep -E '^(hnswlib|mcap|openvino|openvino-telemetry|rosbags|safetensors|torch|transformers)==' src/semantic_anomaly/constraints.txt)
COPY . src/semantic_anomaly
RUN source /opt/ros/jazzy/setup.bash && colcon build --packages-select semantic_anomaly
ENTRYPOINT ["/bin/bash", "-c", "source install/setup.bash && exec ros2 launch semantic_anomaly semantic_anomaly.launch.py \"$@\"", "--"]
