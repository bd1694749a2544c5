"""The devices that share a batch, for parts of a model that divide their own work."""

from __future__ import annotations

import jax
from jax.sharding import AbstractMesh, Mesh

from b2txt_jax.model.interface import DATA


def devices_mesh(mesh: AbstractMesh | Mesh | None = None) -> AbstractMesh | Mesh | None:
    """Return the mesh that a call must be divided over: `mesh`, else that of the surrounding
    `jax.sharding.use_abstract_mesh` or `jax.set_mesh`. None inside a shard_map, and without any."""
    if mesh is None:
        mesh = jax.sharding.get_abstract_mesh()
    manual = jax.sharding.AxisType.Manual in mesh.axis_types
    return None if mesh.empty or manual else mesh


def data_devices(mesh: AbstractMesh | Mesh | None) -> int:
    """Return the devices that share the rows of a batch, 1 without a mesh."""
    return 1 if mesh is None else dict(mesh.shape).get(DATA, 1)
