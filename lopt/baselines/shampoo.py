"""Shampoo: each side of a gradient matrix divided by a root of its second moment, block by block.

Source: Gupta, Koren & Singer (2018), arXiv:1802.09568, Algorithm 1 (order 2) and 2 (order k); with the averages, blocks
and grafting of Anil, Gupta, Koren, Regan & Singer (2020), arXiv:2002.09018, grafted on Adam's second moment as in Shi
et al. (2023), arXiv:2309.06497. For a block G of a matrix

    L ← β2 L + (1-β2) G G',   R ← β2 R + (1-β2) G'G,   D = L^(-1/4) G R^(-1/4),

and of a vector L ← … g g', D = L^(-1/2) g. D is given, for the whole tensor, the norm of g / (sqrt(v) + ε), averaged
over time with bias correction, and descended. β2 = 1 sums instead, as in the first paper.

Differs from the papers: roots by eigendecomposition; the ridge is `ridge` times the largest eigenvalue (Anil et al.'s)
and not an absolute one; tensors of rank above 2 are matrices [product of the other axes, last axis]. Blocks are at most
`block` on a side, so that state is at most 2 · block + 4 numbers a parameter (of vectors; 6 of large matrices).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt.base import positive
from lopt.baselines.base import Rate, average, decay, define, descend, eigh, per_tensor, rate, when


class Sides(NamedTuple):
    left: jax.Array  # [B, r, r], B blocks
    right: jax.Array  # [B, c, c]; of vectors [B, 0, 0]


class State(NamedTuple):
    m: jax.Array  # like p, average of directions
    v: jax.Array  # like p, average of squared gradients
    moments: Sides  # L and R
    roots: Sides  # their inverse roots, of the last refresh


def shampoo(
    learning_rate: Rate,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    ridge: Any = 1e-6,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    every: int = 10,
    block: int = 128,
    graft: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo.

    Args:
      learning_rate: with grafting as Adam's.
      b1: decay of the average of directions.
      b2: decay of second moments; 1: their sum.
      ridge: added to eigenvalues, in units of the largest.
      eps: added to the root of the second moment grafted on.
      weight_decay: decoupled.
      every: updates between refreshes of the roots.
      block: longest side of a block.
      graft: take the step's norm from Adam's second moment.
    """
    positive("shampoo", every=every, block=block)

    def init(p: Any) -> State:
        left, right = (jnp.zeros_like(x) for x in products(blocks(p, block), p.ndim))
        eye = Sides(*(jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=p.dtype), x.shape) for x in (left, right)))
        return State(jnp.zeros_like(p), jnp.zeros_like(p), Sides(left, right), eye)

    def update(g: Any, s: State, p: Any, t: Any) -> tuple[Any, State]:
        new = jnp.where(jnp.asarray(b2) < 1, 1 - b2, 1.0)
        parts = blocks(g, block)
        moments = jax.tree.map(lambda old, x: b2 * old + new * x, s.moments, products(parts, g.ndim))
        power = -0.5 if g.ndim < 2 else -0.25
        due = (t - 1) % every == 0
        roots = when(due, lambda: Sides(*(inverse_root(x, power, ridge) for x in moments)), s.roots)
        direction = roots.left @ parts if g.ndim < 2 else roots.left @ parts @ roots.right
        direction = unblocked(direction, g.shape, block)
        # Averages of L and R start at 0, and roots are as old as the last refresh; the powers make -1/2 in all.
        direction = direction * jnp.sqrt(corrected(b2, t - (t - 1) % every))
        v = b2 * s.v + new * g * g
        if graft:
            target = g / (jnp.sqrt(v / corrected(b2, t)) + eps)
            size = norm(direction)
            direction = direction * norm(target) / jnp.where(size > 0, size, 1.0)
        m = b1 * s.m + (1 - b1) * direction
        return m / (1 - b1**t), State(m, v, moments, roots)

    return descend(per_tensor(init, update), learning_rate, weight_decay)


def corrected(b2: Any, t: Any) -> Any:
    """Adam's 1 - b2^t; 1 for a sum."""
    return jnp.where(jnp.asarray(b2) < 1, 1 - jnp.asarray(b2) ** t, 1.0)


def norm(x: Any) -> Any:
    return jnp.sqrt(jnp.sum(x * x))


def sides(shape: tuple[int, ...], block: int) -> list[tuple[int, int]]:
    """(number of blocks, length of each) of the rows and the columns of a tensor as a matrix; a vector is a column."""
    rows, columns = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)
    counts = [max(-(-d // block), 1) for d in (rows, columns)]
    return [(n, -(-d // n)) for n, d in zip(counts, (rows, columns), strict=True)]


def blocks(x: Any, block: int) -> Any:
    """Blocks [B, r, c] of a tensor, as even as can be, filled up with zeros."""
    (n, r), (k, c) = sides(x.shape, block)
    x = x.reshape((-1, x.shape[-1]) if x.ndim > 1 and x.size else (x.size, 1))
    x = jnp.pad(x, ((0, n * r - x.shape[0]), (0, k * c - x.shape[1])))
    return x.reshape(n, r, k, c).transpose(0, 2, 1, 3).reshape(n * k, r, c)


def unblocked(parts: Any, shape: tuple[int, ...], block: int) -> Any:
    """The inverse of `blocks`."""
    (n, r), (k, c) = sides(shape, block)
    whole = parts.reshape(n, k, r, c).transpose(0, 2, 1, 3).reshape(n * r, k * c)
    rows, columns = (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)
    return whole[:rows, :columns].reshape(shape)


def products(parts: Any, rank: int) -> Sides:
    """G G' and G'G of blocks [B, r, c]; a vector has no right side."""
    left = parts @ parts.mT
    return Sides(left, parts.mT @ parts if rank > 1 else jnp.zeros((len(parts), 0, 0), parts.dtype))


def inverse_root(matrices: Any, power: float, ridge: Any) -> Any:
    """(A + ridge · its largest eigenvalue)^power of symmetric A [B, d, d]; 0 where A is 0."""
    if not matrices.shape[-1]:
        return matrices
    values, vectors = jax.vmap(eigh)(matrices)
    largest = values[:, -1:]
    scaled = jnp.maximum(values, 0.0) + ridge * largest
    roots = jnp.where(largest > 0, jnp.where(scaled > 0, scaled, 1.0) ** power, 0.0)
    return (vectors * roots[:, None, :]) @ vectors.mT


BASELINES = (
    define(
        "shampoo",
        shampoo,
        {"lr": rate(1e-3), "b1": average(0.9), "b2": average(0.999), "weight_decay": decay()},
        source="Gupta et al. (2018), arXiv:1802.09568; Anil et al. (2020), arXiv:2002.09018",
        notes="blocks of at most 128; roots every 10 steps, with a ridge relative to the largest eigenvalue; norms"
        " grafted from Adam's second moment",
    ),
)
