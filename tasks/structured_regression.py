"""Least squares with a structure: groups of coefficients, none negative, or a signal of few levels.

Source: Yuan & Lin (2006), doi:10.1111/j.1467-9868.2005.00532.x (group LASSO); Lawson & Hanson (1974), "Solving least
squares problems", chapter 23 (non-negative least squares); Rudin, Osher & Fatemi (1992),
doi:10.1016/0167-2789(92)90242-F, in one dimension, in the dual of Chambolle (2004),
doi:10.1023/B:JMIV.0000011325.36760.1e (total variation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tasks import certified
from tasks.base import Composite, Split, Task
from tasks.space import Choice, LogFloat, LogInt
from tasks.sparse import squared_norm
from tasks.supervised import require_ends, require_positive, require_within, split_index

if TYPE_CHECKING:
    from jaxtyping import Array, PRNGKeyArray
    from jaxtyping import Float as Floats

SPACE = {
    "structure": Choice(("group_l1", "nonnegative", "total_variation")),
    "rows": LogInt(16, 64),
    "groups": LogInt(8, 32),
    "noise": LogFloat(0.05, 0.3),
    "log10_strength": Choice(((-1.0, -1.0), (-2.0, 0.0))),
}
PENALTIES = {"group_l1": "group_l1", "nonnegative": "box", "total_variation": "box"}  # of lopt.prox
STRUCTURES = tuple(PENALTIES)


class Phi(NamedTuple):
    """An instance."""

    W: Floats[Array, "m n"]
    b: Floats[Array, " m"]
    strength: Floats[Array, ""]  # not of nonnegative
    lipschitz: Floats[Array, ""]


def structured_regression(
    *,
    structure: str = "group_l1",
    rows: int = 40,
    groups: int = 20,
    size: int = 4,
    active: int = 4,
    noise: float = 0.1,
    log10_strength: Sequence[float] = (-1.0, -1.0),
    gradient_noise: float = 0.0,
) -> Task:
    """½‖W x - b‖² + r(x) from 0; an instance a phi.

    Args:
      structure: "group_l1": r = strength · Σ ‖x_g‖ over groups g, params [groups, size], W normal with columns of
        length 1. "nonnegative": x ≥ 0, params [groups · size], W of absolute values. "total_variation": params are the
        dual variables u [rows - 1], |u| ≤ strength, of ½‖s - b‖² + strength · Σ |s_i+1 - s_i| for a signal s: W is the
        transposed difference, and s = b - W u.
      rows: m, of a signal its length.
      groups: of coefficients; n = groups · size.
      size: of a group.
      active: groups that are not 0 in the x* that b = W x* + noise is made of; a signal has as many jumps.
      noise: standard deviation of b's.
      log10_strength: range of the strength's log10; phi draws from it uniformly.
      gradient_noise: standard deviation of the gradient's noise along each axis; validation and test have none.

    Raises ValueError for an invalid setting, naming the valid ones.
    """
    family = "structured_regression"
    if structure not in PENALTIES:
        raise ValueError(f"{family}: structure, got {structure!r}; valid: {', '.join(PENALTIES)}.")
    require_positive(family, "rows", [rows])
    require_positive(family, "groups", [groups])
    require_positive(family, "size", [size])
    most = rows - 1 if structure == "total_variation" else groups
    if not 1 <= active <= most:
        raise ValueError(f"{family}: active, got {active}; valid: 1 to {most}.")
    require_within(family, "noise", noise, 0.0, 1e6)
    require_within(family, "gradient_noise", gradient_noise, 0.0, 1e6)
    require_ends(family, "log10_strength", log10_strength, -8.0, 4.0)
    columns = rows - 1 if structure == "total_variation" else groups * size
    shape = (groups, size) if structure == "group_l1" else (columns,)
    # Expected squares of b, a row; of coefficients that are all positive also the products of two columns.
    overlap = (2 / np.pi) ** 2 if structure == "nonnegative" else 0.0
    count = active * size
    squares = rows if structure == "total_variation" else count + count * (count - 1) * overlap

    def sample(key: PRNGKeyArray) -> Phi:
        w_key, x_key, on_key, noise_key, strength_key = jax.random.split(key, 5)
        strength = 10.0 ** jax.random.uniform(strength_key, minval=log10_strength[0], maxval=log10_strength[1])
        disturbed = noise * jax.random.normal(noise_key, (rows,))
        if structure == "total_variation":
            W = jnp.eye(rows, columns, -1) - jnp.eye(rows, columns)  # (W u)_i = u_i-1 - u_i
            jumps = jax.random.permutation(on_key, rows - 1) < active
            level = jnp.concatenate([jnp.zeros(1, int), jnp.cumsum(jumps)])
            return Phi(
                W, jax.random.normal(x_key, (active + 1,))[level] + disturbed, strength, jnp.full_like(strength, 4.0)
            )
        W = jax.random.normal(w_key, (rows, columns))
        x = jax.random.normal(x_key, (groups, size))
        if structure == "nonnegative":
            W, x = jnp.abs(W), jnp.abs(x)
        W = W / jnp.linalg.norm(W, axis=0, keepdims=True)
        x = jnp.where((jax.random.permutation(on_key, groups) < active)[:, None], x, 0.0)
        return Phi(W, W @ x.reshape(-1) + disturbed, strength, squared_norm(W))

    def penalty(phi: Phi) -> tuple[Any, ...]:
        if structure == "group_l1":
            return (phi.strength,)
        if structure == "nonnegative":
            return jnp.zeros_like(phi.strength), jnp.full_like(phi.strength, jnp.inf)
        return -phi.strength, phi.strength

    def smooth(params: Array, key: PRNGKeyArray, phi: Phi, batch: Array) -> Array:
        return 0.5 * jnp.sum((phi.W @ params.reshape(-1) - phi.b) ** 2) + jnp.vdot(batch, params)

    def loss(params: Array, key: PRNGKeyArray, phi: Phi, batch: Array) -> Array:
        value = smooth(params, key, phi, batch)
        if structure != "group_l1":
            return value
        squares = jnp.sum(params**2, -1)
        lengths = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
        return value + phi.strength * jnp.sum(lengths)

    def batch(key: PRNGKeyArray, phi: Phi, data: Any, split: Split) -> Array:
        z = jax.random.normal(key, shape)
        return gradient_noise * z if split_index(split) == 0 else jnp.zeros_like(z)

    return Task(
        data=(),
        sample=sample,
        init=lambda key, phi: jnp.zeros(shape, jnp.float32),
        batch=batch,
        loss=loss,
        name=f"{family}({structure}, {rows} rows, {groups} x {size}, {active} active, noise {noise:g}, strength "
        f"10^{log10_strength[0]:g} to 10^{log10_strength[1]:g}, gradient noise {gradient_noise:g})",
        init_loss=0.5 * (squares + rows * noise**2),
        deterministic=gradient_noise == 0.0,
        composite=Composite(
            smooth,
            penalty,
            lambda phi: phi.lipschitz,
            PENALTIES[structure],
            optimum=lambda phi, data: optimum(structure, shape, phi),
        ),
    )


# Certified optima


def optimum(structure: str, shape: tuple[int, ...], phi: Any) -> certified.Optimum:
    """Certified optima of instances, phi with a leading axis: FISTA finds what is 0 or at a bound, Newton's method the
    rest.

    Args:
      structure: of STRUCTURES.
      shape: of params.
      phi: `Phi`, N of them.
    """
    certify, prox, polish = SOLVERS[structure]
    W, b, strength = (np.asarray(leaf, float) for leaf in phi[:3])

    def of(given: tuple[Any, ...]) -> Problem:
        return Problem(given[0], given[1], float(given[2]), shape)

    problem = certified.Composite(
        gradient=lambda given, x: np.einsum("kmn,km->kn", given[0], np.einsum("kmn,kn->km", given[0], x) - given[1]),
        prox=certified.one_by_one(lambda given, v, step: prox(of(given), v, step)),
        polish=certified.one_by_one(lambda given, x: polish(of(given), x)),
        certify=certified.one_by_one(lambda given, x: certify(of(given), x)),
    )
    step = 1 / np.linalg.norm(W, 2, axis=(1, 2)) ** 2
    return certified.descend(problem, (W, b, strength), np.zeros((len(W), W.shape[2])), step)


class Problem(NamedTuple):
    """An instance in NumPy."""

    W: Floats[np.ndarray, "m n"]
    b: Floats[np.ndarray, " m"]
    strength: float
    shape: tuple[int, ...]


def _groups_certify(p: Problem, x: np.ndarray) -> certified.Optimum:
    """The residual, made small enough, is a dual point: ‖(Wᵀ u)_g‖ ≤ strength."""
    u = p.W @ x - p.b
    steepest = np.max(np.linalg.norm((p.W.T @ u).reshape(p.shape), axis=1))
    value = 0.5 * u @ u + p.strength * np.sum(np.linalg.norm(x.reshape(p.shape), axis=1))
    u = u * min(1.0, p.strength / max(steepest, 1e-300))
    return certified.Optimum(x, value, value + 0.5 * u @ u + u @ p.b)


def _groups_prox(p: Problem, v: np.ndarray, step: float) -> np.ndarray:
    v = v.reshape(p.shape)
    length = np.linalg.norm(v, axis=1, keepdims=True)
    return (v * np.maximum(1 - p.strength * step / np.maximum(length, 1e-300), 0)).ravel()


def _groups_polish(p: Problem, x: np.ndarray) -> np.ndarray:
    """Newton steps on the groups that are not 0, where the lengths are smooth."""
    kept = np.linalg.norm(x.reshape(p.shape), axis=1) > 0
    on, size = np.repeat(kept, p.shape[1]), p.shape[1]
    A, out = p.W[:, on], x.copy()
    if not kept.sum() > 0:
        return out
    for _ in range(certified.NEWTON):
        z = out[on].reshape(-1, size)
        length = np.linalg.norm(z, axis=1)[:, None]
        gradient = A.T @ (A @ z.ravel() - p.b) + p.strength * (z / length).ravel()
        hessian = A.T @ A
        for g, (row, far) in enumerate(zip(z / length, length[:, 0], strict=True)):
            at = slice(g * size, (g + 1) * size)
            hessian[at, at] += p.strength / far * (np.eye(size) - np.outer(row, row))
        out[on] = z.ravel() - np.linalg.lstsq(hessian, gradient, rcond=None)[0]
    return out


def _inside(low: float, high: float) -> Callable[..., np.ndarray]:
    """Least squares over what is strictly inside; what that leads out of the box stays at its bound."""

    def polish(p: Problem, x: np.ndarray) -> np.ndarray:
        least, most = low * p.strength, high * p.strength
        free, out = (x > least) & (x < most), x.copy()
        for _ in range(len(x)):
            if not free.any():
                break
            rest = p.b - p.W[:, ~free] @ out[~free]
            out[free] = np.linalg.lstsq(p.W[:, free], rest, rcond=None)[0]
            beyond = free & ((out < least) | (out > most))
            out = np.clip(out, least, most)
            if not beyond.any():
                break
            free &= ~beyond
        return out

    return polish


def _positive_certify(p: Problem, x: np.ndarray) -> certified.Optimum:
    """The residual, moved along 1 until Wᵀ u ≥ 0, is a dual point; W has no negative element."""
    u = p.W @ x - p.b
    value = 0.5 * u @ u
    u = u + max(0.0, float(np.max(-(p.W.T @ u) / p.W.sum(0))))
    return certified.Optimum(x, value, value + 0.5 * u @ u + u @ p.b)


def _variation_certify(p: Problem, u: np.ndarray) -> certified.Optimum:
    """What u loses against the signal s = b - W u: ½‖W u - b‖² + ½‖s - b‖² + strength · Σ |jumps| - ½‖b‖²."""
    s = p.b - p.W @ u
    value = 0.5 * s @ s
    signal = 0.5 * np.sum((p.W @ u) ** 2) + p.strength * np.sum(np.abs(np.diff(s)))
    return certified.Optimum(u, value, value + signal - 0.5 * p.b @ p.b)


SOLVERS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "group_l1": (_groups_certify, _groups_prox, _groups_polish),
    "nonnegative": (_positive_certify, lambda p, v, step: np.maximum(v, 0.0), _inside(0.0, np.inf)),
    "total_variation": (
        _variation_certify,
        lambda p, v, step: np.clip(v, -p.strength, p.strength),
        _inside(-1.0, 1.0),
    ),
}
