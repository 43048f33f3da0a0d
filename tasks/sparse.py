"""Random linear models with few nonzero coefficients, whose loss has an l1 penalty. Not a family itself.

Source: Liu et al. (2023), arXiv:2305.18577, section 5; certified optima of an instance: `tasks.certified`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from tasks.base import Composite, Split, Task
from tasks.supervised import require_positive, split_index

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PRNGKeyArray

    Range = Sequence[float]

ITERATIONS = 100  # of the power method


class Phi(NamedTuple):
    """An instance."""

    W: Float[Array, "m n"]
    b: Float[Array, " m"]  # targets; labels 0 and 1 of a logistic model
    strength: Float[Array, ""]  # of the penalty
    lipschitz: Float[Array, ""]  # of the smooth part's gradient


def squared_norm(W: Float[Array, "m n"]) -> Float[Array, ""]:
    """The square of W's largest singular value, by the power method on the smaller Gram matrix."""
    gram = W @ W.T if W.shape[0] < W.shape[1] else W.T @ W

    def step(v: Array, _: None) -> tuple[Array, None]:
        v = gram @ v
        return v / jnp.maximum(jnp.linalg.norm(v), 1e-30), None

    v, _ = jax.lax.scan(step, jnp.full(len(gram), len(gram) ** -0.5, W.dtype), None, length=ITERATIONS)
    # From below, by the square of how far v still is from its limit; the step has a margin of 1e-4.
    return jnp.linalg.norm(gram @ v)


def linear_model(
    family: str,
    smooth: Callable[[Phi, Array], Array],
    targets: Callable[[Array], Array],
    bound: float,
    *,
    rows: int,
    columns: int,
    nonzeros: int,
    magnitude: Range,
    shift: Range,
    log10_strength: Range,
    noise: float,
    unit_columns: bool,
    init_loss: float | None,
) -> Task:
    """A family of instances, see `tasks.lasso`.

    Args:
      family: name of the caller.
      smooth: `(phi, x) -> f(x)`.
      targets: of W x for the true x.
      bound: of the second derivative of f by an element of W x.
      init_loss: expected loss at 0, or None.
    """
    require_positive(family, "rows", [rows])
    require_positive(family, "columns", [columns])
    if not 1 <= nonzeros <= columns:
        raise ValueError(f"{family}: nonzeros, got {nonzeros}; valid: 1 to columns = {columns}.")
    for name, (low, high), least, most in (
        ("magnitude", magnitude, 1e-6, 1e6),
        ("shift", shift, 0.0, 0.99),
        ("log10_strength", log10_strength, -8.0, 4.0),
    ):
        if not least <= low <= high <= most:
            raise ValueError(f"{family}: {name}, got ({low}, {high}); valid: a range (low, high) in [{least}, {most}].")

    if not 0.0 <= noise <= 1e6:
        raise ValueError(f"{family}: noise, got {noise}; valid: 0 to 1e6.")

    def between(key: PRNGKeyArray, ends: Range) -> Array:
        return jax.random.uniform(key, minval=ends[0], maxval=ends[1])

    def sample(key: PRNGKeyArray) -> Phi:
        w_key, x_key, support_key, size_key, shift_key, strength_key = jax.random.split(key, 6)
        mean = between(shift_key, shift)
        W = (1 - mean) * jax.random.normal(w_key, (rows, columns)) + mean
        if unit_columns:
            W = W / jnp.linalg.norm(W, axis=0, keepdims=True)
        on = jax.random.permutation(support_key, columns) < nonzeros
        x = jnp.where(on, between(size_key, magnitude) * jax.random.normal(x_key, (columns,)), 0.0)
        strength = 10.0 ** between(strength_key, log10_strength)
        return Phi(W, targets(W @ x), strength, bound * squared_norm(W))

    def batch(key: PRNGKeyArray, phi: Phi, data: Any, split: Split) -> Float[Array, " n"]:
        z = jax.random.normal(key, (columns,))
        return noise * z if split_index(split) == 0 else jnp.zeros_like(z)

    def noisy(params: Array, key: PRNGKeyArray, phi: Phi, batch: Array) -> Array:
        return smooth(phi, params) + batch @ params

    def loss(params: Array, key: PRNGKeyArray, phi: Phi, batch: Array) -> Array:
        return noisy(params, key, phi, batch) + phi.strength * jnp.sum(jnp.abs(params))

    return Task(
        data=(),
        sample=sample,
        init=lambda key, phi: jnp.zeros(columns, jnp.float32),
        batch=batch,
        loss=loss,
        name=f"{family}({rows}x{columns}, {nonzeros} nonzeros, strength 10^{log10_strength[0]:g} to "
        f"10^{log10_strength[1]:g}, shift to {shift[1]:g}, noise {noise:g})",
        init_loss=init_loss,
        deterministic=noise == 0.0,
        composite=Composite(
            smooth=noisy,
            penalty=lambda phi: (phi.strength,),
            lipschitz=lambda phi: phi.lipschitz,
        ),
    )
