"""Low-rank matrix completion: least squares on the elements that are known, with the nuclear norm.

Source: Candès & Recht (2009), doi:10.1007/s10208-009-9045-5; in this form Mazumder, Hastie & Tibshirani (2010),
"Spectral regularization algorithms for learning large incomplete matrices", JMLR 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tasks import certified
from tasks.base import Composite, Split, Task
from tasks.space import Choice, LogFloat, LogInt
from tasks.supervised import require_ends, require_positive, require_within, split_index

if TYPE_CHECKING:
    from jaxtyping import Array, PRNGKeyArray
    from jaxtyping import Float as Floats

SPACE = {
    "rows": LogInt(8, 24),
    "columns": LogInt(8, 24),
    "rank": LogInt(1, 3),
    "known": LogFloat(0.3, 0.8),
    "noise": LogFloat(0.05, 0.3),
    "log10_strength": Choice(((-0.5, -0.5), (-1.0, 0.0))),
}


class Phi(NamedTuple):
    """An instance."""

    mask: Floats[Array, "m n"]  # 1 where the element is known, otherwise 0
    b: Floats[Array, "m n"]  # known elements, 0 elsewhere
    strength: Floats[Array, ""]


def matrix_completion(
    *,
    rows: int = 12,
    columns: int = 10,
    rank: int = 2,
    known: float = 0.5,
    noise: float = 0.1,
    log10_strength: Sequence[float] = (-0.5, -0.5),
    gradient_noise: float = 0.0,
) -> Task:
    """½ Σ (X - B)² over known elements + strength · the nuclear norm of X, from 0; an instance a phi.

    Args:
      rows: of X.
      columns: of X.
      rank: of the matrix that B is seen of.
      known: probability that an element is.
      noise: standard deviation of B's.
      log10_strength: range of the strength's log10; phi draws from it uniformly.
      gradient_noise: standard deviation of the gradient's noise along each axis; validation and test have none.

    Raises ValueError for an invalid setting, naming the valid ones.
    """
    family = "matrix_completion"
    require_positive(family, "rows", [rows])
    require_positive(family, "columns", [columns])
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(f"{family}: rank, got {rank}; valid: 1 to {min(rows, columns)}.")
    if not 0.0 < known <= 1.0:
        raise ValueError(f"{family}: known, got {known}; valid: (0, 1].")
    require_within(family, "noise", noise, 0.0, 1e6)
    require_within(family, "gradient_noise", gradient_noise, 0.0, 1e6)
    require_ends(family, "log10_strength", log10_strength, -8.0, 4.0)

    def sample(key: PRNGKeyArray) -> Phi:
        left_key, right_key, mask_key, noise_key, strength_key = jax.random.split(key, 5)
        left, right = jax.random.normal(left_key, (rows, rank)), jax.random.normal(right_key, (rank, columns))
        whole = left @ right / rank**0.5 + noise * jax.random.normal(noise_key, (rows, columns))
        mask = jnp.asarray(jax.random.uniform(mask_key, (rows, columns)) < known, whole.dtype)
        strength = 10.0 ** jax.random.uniform(strength_key, minval=log10_strength[0], maxval=log10_strength[1])
        return Phi(mask, mask * whole, strength)

    def smooth(params: Array, key: PRNGKeyArray, phi: Phi, batch: Array) -> Array:
        return 0.5 * jnp.sum((phi.mask * params - phi.b) ** 2) + jnp.vdot(batch, params)

    def loss(params: Array, key: PRNGKeyArray, phi: Phi, batch: Array) -> Array:
        return smooth(params, key, phi, batch) + phi.strength * nuclear_norm(params)

    def batch(key: PRNGKeyArray, phi: Phi, data: Any, split: Split) -> Array:
        z = jax.random.normal(key, (rows, columns))
        return gradient_noise * z if split_index(split) == 0 else jnp.zeros_like(z)

    return Task(
        data=(),
        sample=sample,
        init=lambda key, phi: jnp.zeros((rows, columns), jnp.float32),
        batch=batch,
        loss=loss,
        name=f"{family}({rows}x{columns}, rank {rank}, {known:g} known, noise {noise:g}, strength "
        f"10^{log10_strength[0]:g} to 10^{log10_strength[1]:g}, gradient noise {gradient_noise:g})",
        init_loss=0.5 * rows * columns * known * (1 + noise**2),
        deterministic=gradient_noise == 0.0,
        composite=Composite(
            smooth, lambda phi: (phi.strength,), lambda phi: jnp.ones_like(phi.strength), "nuclear", optimum
        ),
    )


@jax.custom_jvp
def nuclear_norm(x: Floats[Array, "m n"]) -> Floats[Array, ""]:
    """The sum of singular values; its derivative is a subgradient, also where some are 0 or equal."""
    return jnp.sum(jnp.linalg.svd(x, compute_uv=False))


@nuclear_norm.defjvp
def _(primals: Any, tangents: Any) -> Any:
    left, values, right = jnp.linalg.svd(primals[0], full_matrices=False)
    kept = jnp.where(values > 1e-6 * jnp.maximum(values[0], 1e-30), 1.0, 0.0)
    slope = (left * kept[None]) @ right
    return jnp.sum(values), jnp.vdot(slope, tangents[0])


def optimum(phi: Any, data: Any = ()) -> certified.Optimum:
    """Certified optima of instances, phi with a leading axis: FISTA with restarts, to a gap of 1e-13."""
    del data
    mask, b, strength = (np.asarray(leaf, float) for leaf in phi)

    def prox(given: tuple[np.ndarray, ...], v: np.ndarray, step: np.ndarray) -> np.ndarray:
        left, values, right = np.linalg.svd(v, full_matrices=False)
        return (left * np.maximum(values - (given[2] * step)[:, None], 0)[:, None, :]) @ right

    def certify(given: tuple[np.ndarray, ...], x: np.ndarray) -> certified.Optimum:
        """The residual, made small enough in the spectral norm, is a dual point."""
        mask, b, strength = given
        u = mask * x - b
        value = 0.5 * np.sum(u * u, (1, 2)) + strength * np.sum(np.linalg.svd(x, compute_uv=False), 1)
        steepest = np.linalg.norm(u, 2, axis=(1, 2))
        u = u * np.minimum(1.0, strength / np.maximum(steepest, 1e-300))[:, None, None]
        return certified.Optimum(x, value, value + 0.5 * np.sum(u * u, (1, 2)) + np.sum(u * b, (1, 2)))

    problem = certified.Composite(lambda given, x: given[0] * x - given[1], prox, lambda given, x: x, certify)
    return certified.descend(problem, (mask, b, strength), np.zeros_like(b), np.ones(len(b)))
