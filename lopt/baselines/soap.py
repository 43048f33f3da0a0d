"""SOAP: Adam in the slowly turning eigenbasis of Shampoo's preconditioner.

Source: Vyas, Morwani, Zhao, Shapira, Brandfonbrener, Janson & Kakade (2024), arXiv:2409.11321, Algorithm 3. For a
tensor with gradient G, and for each axis k the statistics L_k = EMA of G G' over the other axes, with eigenbasis Q_k,

    M ← β1 M + (1-β1) G;  V ← β2 V + (1-β2) (Q'G)²;  u = -lr · Q [ Q'M / (sqrt(V) + ε) ],   both corrected as in Adam.

Q is refreshed every `every` steps by one step of the power method and a QR decomposition (Algorithm 4), its columns and
V's elements sorted by the estimated eigenvalues.

As in the authors' code: the first update makes the basis and moves nothing; tensors of rank 0 and 1 get Adam; an axis
longer than `max_dim` keeps the identity, so that memory is bounded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt.base import positive
from lopt.baselines.base import Rate, average, decay, define, descend, eigh, orthogonal, per_tensor, rate, when


class State(NamedTuple):
    m: jax.Array  # like p, average of gradients
    v: jax.Array  # like p, average of squared gradients in the basis
    grams: dict[str, jax.Array]  # axis -> [d, d], average of G G' over the other axes
    bases: dict[str, jax.Array]  # axis -> [d, d], columns are eigenvectors


def soap(
    learning_rate: Rate,
    *,
    b1: Any = 0.95,
    b2: Any = 0.95,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    every: int = 10,
    max_dim: int = 1024,
) -> optax.GradientTransformationExtraArgs:
    """SOAP.

    Args:
      learning_rate: as AdamW's.
      b1: decay of m.
      b2: decay of v and of the preconditioner.
      eps: added to the root of v.
      weight_decay: decoupled.
      every: updates between refreshes of the bases.
      max_dim: longest axis that is preconditioned.
    """
    positive("soap", every=every, max_dim=max_dim)

    def axes(x: Any) -> list[int]:
        return [k for k, d in enumerate(jnp.shape(x)) if 1 < d <= max_dim] if jnp.ndim(x) > 1 else []

    def init(p: Any) -> State:
        eye = {str(k): jnp.eye(p.shape[k], dtype=p.dtype) for k in axes(p)}
        return State(jnp.zeros_like(p), jnp.zeros_like(p), {k: jnp.zeros_like(x) for k, x in eye.items()}, eye)

    def update(g: Any, s: State, p: Any, t: Any) -> tuple[Any, State]:
        past = t - 1  # updates that moved
        n = jnp.maximum(past, 1)
        m = s.m + (1 - b1) * (g - s.m)
        v = s.v + (1 - b2) * (into(g, s.bases) ** 2 - s.v)
        correction = jnp.sqrt(1 - b2**n) / (1 - b1**n)
        direction = out_of(correction * into(m, s.bases) / (jnp.sqrt(v) + eps), s.bases)
        first = past == 0
        m, v, direction = (jnp.where(first, 0.0, x) for x in (m, v, direction))
        grams = {k: x + (1 - b2) * (gram(g, int(k)) - x) for k, x in s.grams.items()}
        if not grams:
            return direction, State(m, v, grams, s.bases)
        bases = when(first, lambda: {k: eigenbasis(x) for k, x in grams.items()}, s.bases)
        due = (past > 0) & (past % every == 0)
        v, bases = when(due, lambda: turned(v, grams, bases), (v, bases))
        return direction, State(m, v, grams, bases)

    return descend(per_tensor(init, update), learning_rate, weight_decay)


def gram(g: Any, axis: int) -> Any:
    """G G' over all axes but one. [d, d]"""
    others = [k for k in range(g.ndim) if k != axis]
    return jnp.tensordot(g, g, axes=(others, others))


def along(x: Any, matrix: Any, axis: int) -> Any:
    """x with matrix' applied along an axis."""
    return jnp.moveaxis(jnp.tensordot(x, matrix, axes=(axis, 0)), -1, axis)


def into(x: Any, bases: dict[str, Any]) -> Any:
    """Coordinates in the bases, Q'x along every axis that has one."""
    for k, q in bases.items():
        x = along(x, q, int(k))
    return x


def out_of(x: Any, bases: dict[str, Any]) -> Any:
    """The inverse of `into`."""
    for k, q in bases.items():
        x = along(x, q.T, int(k))
    return x


def eigenbasis(matrix: Any) -> Any:
    """Eigenvectors as columns, of the largest eigenvalue first."""
    return eigh(matrix)[1][:, ::-1]


def turned(v: Any, grams: dict[str, Any], bases: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Algorithm 4: (v, bases) after a step of the power method, sorted by estimated eigenvalues."""
    after = {}
    for k, q in bases.items():
        power = grams[k] @ q
        order = jnp.argsort(jnp.sum(q * power, axis=0), descending=True)
        v = jnp.take(v, order, axis=int(k))
        after[k] = orthogonal(power[:, order])
    return v, after


BASELINES = (
    define(
        "soap",
        soap,
        {"lr": rate(3e-3), "b1": average(0.95), "b2": average(0.95), "weight_decay": decay()},
        source="Vyas et al. (2024), arXiv:2409.11321",
        notes="the first update moves nothing; bases every 10 steps; axes above 1024 are not preconditioned",
    ),
)
