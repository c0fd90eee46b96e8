"""What the nodes of a test cluster have."""

from __future__ import annotations

OBJECT_STORE_BYTES = 80 * 2**20
NODE = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES}
