"""Trees of jax arrays."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

from .adapter import Job, Load, model_why_not, phases
from .models import reported

__all__ = ["flax_why_not", "safetensors_flax", "weightlift_flax"]


def flax_leaf(name: str, shape: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The path of a UNet's torch parameter in the Flax tree, and how its axes are permuted."""
    *path, kind = re.sub(r"\.(\d+)(?=\.|$)", r"_\1", name).split(".")
    if kind == "weight":
        kind = "scale" if len(shape) == 1 else "kernel"
    axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(len(shape) if kind == "kernel" else 0)
    return (*path, kind), axes or tuple(range(len(shape)))


def flax_why_not(job: Job) -> str | None:
    if importlib.util.find_spec("jax") is None or importlib.util.find_spec("flax") is None:
        return "jax and flax are not installed"
    return model_why_not(job)


def _nested(leaves: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        place = tree
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = leaf
    return tree


def weightlift_flax(job: Job) -> Load:
    import jax
    from safetensors import safe_open

    import weightlift.flax

    like = {}
    for file in job.files:
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118
                shape = tuple(opened.get_slice(name).get_shape())
                path, axes = flax_leaf(name, shape)
                permuted = tuple(shape[axis] for axis in axes)
                like[path] = jax.ShapeDtypeStruct(permuted, "float32")
    tree = _nested(like)
    start_jax()

    return reported(
        lambda: jax.block_until_ready(
            weightlift.flax.load_params(job.folder or "", tree, from_pt=True)
        )
    )


def safetensors_flax(job: Job) -> Load:
    import jax
    import jax.numpy as jnp
    from safetensors.flax import load_file

    start_jax()

    def load() -> Any:
        leaves = {}
        for file in job.files:
            tensors = load_file(file)
            phases.mark("move")
            while tensors:  # does not keep an array beside its converted copy
                name, array = tensors.popitem()
                path, axes = flax_leaf(name, array.shape)
                leaves[path] = jnp.transpose(array, axes)
        return jax.block_until_ready(_nested(leaves))

    return load


def start_jax() -> None:
    import jax

    jax.block_until_ready(jax.numpy.zeros(1))
