"""Random linear models with few nonzero coefficients, whose loss has an l1 penalty. Not a family itself.

Source: Liu et al. (2023), arXiv:2305.18577, section 5; certified optima of an instance: `tasks.certified`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tasks import certified
from tasks.base import Composite, Split, Task
from tasks.supervised import require_ends, require_positive, require_within, split_index

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PRNGKeyArray

    Range = Sequence[float]

SQUARINGS = 10  # of a Gram matrix, for the norm of its 2048th power


class Phi(NamedTuple):
    """An instance."""

    W: Float[Array, "m n"]
    b: Float[Array, " m"]  # targets; labels 0 and 1 of a logistic model
    strength: Float[Array, ""]  # of the penalty
    lipschitz: Float[Array, ""]  # of the smooth part's gradient


def squared_norm(W: Float[Array, "m n"]) -> Float[Array, ""]:
    """W's squared largest singular value, never from below: of a step that is too long no theorem speaks.

    The largest eigenvalue of the smaller Gram matrix G is at most (tr G^p)^(1/p), for p = 2048 at most 1.003 times too
    much with 250 rows, and exact where the second one is smaller by some percent. What rounding may have cost is added:
    a product of two matrices over K elements is off by at most K u times their Frobenius norms (Higham 2002, "Accuracy
    and stability of numerical algorithms", section 3.5), and an eigenvalue by as much (Weyl). In float32 that is 6e-5
    of it for 20 × 40 and 9e-3 for 250 × 500, in float64 nothing.
    """
    W = W if W.shape[0] < W.shape[1] else W.T
    info = jnp.finfo(W.dtype)

    def rounding(product: Array, inner: int, norms: Any) -> Array:
        """log of what the largest eigenvalue of a computed product may be too small by; that is ≥ ‖P‖² / tr P."""
        largest = jnp.sum(product * product) / jnp.maximum(jnp.trace(product), info.tiny)
        unit = 0.55 * info.eps  # u = ε / 2, and a tenth for terms of second order
        return jnp.log1p(inner * unit * norms / jnp.maximum(largest, info.tiny))

    def square(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], None]:
        gram, log, power = carry  # log λ ≤ log + power · log λ(gram)
        size = 2.0 ** jnp.floor(jnp.log2(jnp.maximum(jnp.linalg.norm(gram), info.tiny)) + 1)  # division is exact
        product = jnp.matmul(gram / size, gram / size, precision="highest")
        power = power / 2
        return (product, log + power * (2 * jnp.log(size) + rounding(product, len(gram), 1.0)), power), None

    gram = jnp.matmul(W, W.T, precision="highest")
    start = gram, rounding(gram, W.shape[1], jnp.trace(gram)), jnp.ones((), W.dtype)
    (gram, log, power), _ = jax.lax.scan(square, start, None, length=SQUARINGS)
    return jnp.exp(log + power * jnp.log(jnp.maximum(jnp.linalg.norm(gram), info.tiny)))


def linear_model(
    family: str,
    smooth: Callable[[Phi, Array], Array],
    targets: Callable[[Array], Array],
    bound: float,
    solver: certified.Smooth,
    *,
    rows: int,
    columns: int,
    nonzeros: int,
    magnitude: Range,
    shift: Range,
    log10_strength: Range,
    noise: float,
    l2: float = 0.0,
    unit_columns: bool,
    init_loss: float | None,
) -> Task:
    """A family of instances, see `tasks.lasso`.

    Args:
      family: name of the caller.
      smooth: `(phi, x) -> f(x)`.
      targets: of W x for the true x.
      bound: of the second derivative of f by an element of W x.
      solver: the same f for certified optima.
      init_loss: expected loss at 0, or None.
    """
    require_positive(family, "rows", [rows])
    require_positive(family, "columns", [columns])
    if not 1 <= nonzeros <= columns:
        raise ValueError(f"{family}: nonzeros, got {nonzeros}; valid: 1 to columns = {columns}.")
    for name, ends, least, most in (
        ("magnitude", magnitude, 1e-6, 1e6),
        ("shift", shift, 0.0, 0.99),
        ("log10_strength", log10_strength, -8.0, 4.0),
    ):
        require_ends(family, name, ends, least, most)
    require_within(family, "noise", noise, 0.0, 1e6)
    require_within(family, "l2", l2, 0.0, 1e6)

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
        whole = noisy(params, key, phi, batch) + phi.strength * jnp.sum(jnp.abs(params))
        return whole + l2 / 2 * jnp.sum(params**2) if l2 else whole

    def optimum(phi: Phi, data: Any) -> certified.Optimum:
        del data
        W, b = np.asarray(phi.W), np.asarray(phi.b)
        if l2:  # more rows of a LASSO
            W = np.concatenate([W, np.broadcast_to(l2**0.5 * np.eye(columns), (len(W), columns, columns))], 1)
            b = np.concatenate([b, np.zeros((len(b), columns))], 1)
        return certified.minimum(solver, W, b, np.asarray(phi.strength))

    return Task(
        data=(),
        sample=sample,
        init=lambda key, phi: jnp.zeros(columns, jnp.float32),
        batch=batch,
        loss=loss,
        name=f"{family}({rows}x{columns}, {nonzeros} nonzeros, strength 10^{log10_strength[0]:g} to "
        f"10^{log10_strength[1]:g}, shift to {shift[1]:g}, noise {noise:g}{f', l2 {l2:g}' if l2 else ''})",
        init_loss=init_loss,
        deterministic=noise == 0.0,
        composite=Composite(
            smooth=noisy,
            penalty=lambda phi: (phi.strength, jnp.full_like(phi.strength, l2)) if l2 else (phi.strength,),
            lipschitz=lambda phi: phi.lipschitz,
            kind="elastic_net" if l2 else "l1",
            optimum=optimum,
        ),
    )
