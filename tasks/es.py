"""Tasks whose gradient is estimated by evolution strategies: noisy, and blind to the loss's smoothness.

Source: Salimans et al. (2017), "Evolution strategies as a scalable alternative to reinforcement learning",
arXiv:1703.03864.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

import tasks
from tasks.augment import Phi, changed, drawing
from tasks.base import Task
from tasks.space import Choice, LogFloat, LogInt
from tasks.supervised import is_range, log_uniform, require_positive, require_range, spoken

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PRNGKeyArray

SPACE = {
    ("task", "settings"): Choice(
        (
            ("image_mlp", {"data": "digits", "size": 8, "hidden": (8,)}),
            ("image_mlp", {"data": "mnist5k", "size": 8, "hidden": (16,)}),
            ("logistic_regression", {"data": "wine", "size": None}),
            ("synthetic", {"function": "rastrigin", "dim": 8}),
            ("quadratic", {"dim": 32}),
        )
    ),
    "pairs": LogInt(4, 64),
    "std": LogFloat(0.003, 0.1),
}


def es(
    *,
    task: str = "image_mlp",
    settings: Mapping[str, Any] | None = None,
    pairs: int = 32,
    std: float | Sequence[float] = 0.02,
) -> Task:
    """A task of another family by the gradient of its Gaussian smoothing, in float32 whatever the params' type.

    Args:
      task: the other family.
      settings: of the other family; None: those of a small MLP on 8×8 digits, or none for another family.
      pairs: antithetic perturbations of the params a gradient takes.
      std: of the perturbations, 1e-6 to 1e6. Of a range (low, high) phi draws log-uniformly.

    Raises ValueError for an invalid setting, naming the valid ones.
    """
    require_positive("es", "pairs", [pairs])
    require_range("es", "std", std, 1e-6, 1e6)
    if settings is None:
        settings = {"data": "digits", "hidden": (8,)} if task == "image_mlp" else {}
    plain = inner = tasks.make(task, **settings)
    if is_range(std):
        inner = drawing(plain, lambda key, phi: ())
        inner = inner._replace(sample=lambda key: Phi(plain.sample(key), log_uniform(key, std)))

    def value_and_grad(params: Any, key: PRNGKeyArray, phi: Any, batch: Any) -> tuple[Float[Array, ""], Any]:
        noise_key, loss_key = jax.random.split(key)
        # Of 8 bits (bfloat16) neither params nor losses change by a small perturbation: all of this is in 32.
        full, phi, batch = (jax.tree.map(_float32, tree) for tree in (params, phi, batch))
        flat, unravel = ravel_pytree(full)
        spread: Any = phi.drawn if is_range(std) else std
        noise = spread * jax.random.normal(noise_key, (pairs, flat.size), flat.dtype)

        def loss(perturbation: Array) -> Array:
            return inner.loss(unravel(flat + perturbation), loss_key, phi, batch)

        plus, minus = jax.vmap(loss)(noise), jax.vmap(loss)(-noise)
        grads = unravel((plus - minus) @ noise / (2 * pairs * spread**2))
        return jnp.mean(0.5 * (plus + minus)), jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)

    return changed(inner, value_and_grad=value_and_grad, name=f"es({inner.name}, {pairs} pairs, std {spoken(std)})")


def _float32(leaf: Array) -> Array:
    return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
