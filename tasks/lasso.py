"""LASSO: least squares with an l1 penalty.

Source: Tibshirani (1996), doi:10.1111/j.2517-6161.1996.tb02080.x; instances as in Liu et al. (2023), arXiv:2305.18577.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tasks import certified
from tasks.base import SPLITS, Composite, Split, Task
from tasks.data import images
from tasks.space import Choice, LogInt
from tasks.sparse import linear_model
from tasks.supervised import require_ends, require_positive

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, PRNGKeyArray

SPACE = {
    "rows": LogInt(16, 64),
    "columns": LogInt(16, 128),
    "nonzeros": LogInt(2, 12),
    "shift": Choice(((0.0, 0.0), (0.0, 0.3))),
    "log10_strength": Choice(((-1.0, -1.0), (-2.0, -1.0))),
}


def lasso(
    *,
    rows: int = 20,
    columns: int = 40,
    nonzeros: int = 5,
    magnitude: Sequence[float] = (1.0, 1.0),
    shift: Sequence[float] = (0.0, 0.0),
    log10_strength: Sequence[float] = (-1.0, -1.0),
    l2: float = 0.0,
    noise: float = 0.0,
) -> Task:
    """½‖W x - b‖² + strength · Σ |x| + l2 / 2 · Σ x² from 0; an instance a phi: b = W x* for an x* with few nonzeros.

    Args:
      rows: m.
      columns: n; those of W have length 1.
      nonzeros: of x*, normal times the magnitude.
      magnitude: range of it; phi draws from it uniformly.
      shift: range of u; W is (1 - u) · normal + u before its columns are scaled. Above 0 columns are correlated and the
        problem is ill-conditioned (.3 in the recorded instances).
      log10_strength: range of the strength's log10; phi draws from it uniformly.
      l2: of the elastic net (Zou & Hastie 2005, doi:10.1111/j.1467-9868.2005.00503.x), which is part of the penalty.
      noise: standard deviation of the gradient's noise along each axis; validation and test have none.

    Raises ValueError for an invalid setting, naming the valid ones.
    """
    plain = shift[1] == 0 and magnitude[0] == magnitude[1]
    return linear_model(
        "lasso",
        lambda phi, x: 0.5 * jnp.sum((phi.W @ x - phi.b) ** 2),
        lambda z: z,
        1.0,
        certified.SQUARED,
        rows=rows,
        columns=columns,
        nonzeros=nonzeros,
        magnitude=magnitude,
        shift=shift,
        log10_strength=log10_strength,
        l2=l2,
        noise=noise,
        unit_columns=True,
        init_loss=0.5 * nonzeros * magnitude[0] ** 2 if plain else None,
    )


class Patch(NamedTuple):
    """An instance of `patches`."""

    index: Int[Array, ""]  # of the patch in the data
    strength: Float[Array, ""]
    lipschitz: Float[Array, ""]


class Known(NamedTuple):
    """A matrix and a right-hand side, or one of each patch."""

    W: Float[Array, "m n"]
    b: Float[Array, " m"]


def patches(
    *,
    data: str = "mnist5k",
    atoms: int = 128,
    log10_strength: Sequence[float] = (-0.30103, -0.30103),
    split: Split = "test",
) -> Task:
    """8 × 8 image patches in a dictionary learned from others of the set's training images: `tasks.lasso:patches`.

    Args:
      data: images of 28 × 28 or more. A patch is one that is not blank, of mean 0, all scaled by one number to a mean
        square of 1.
      atoms: n of the dictionary [64, n], columns of length 1, made by `dictionary`.
      log10_strength: range of the strength's log10 (-.30103: .5, as in Liu et al.); phi draws from it uniformly.
      split: of the images that instances are patches of. The dictionary is of the training images.

    Raises ValueError for an invalid setting, naming the valid ones.
    """
    require_positive("lasso.patches", "atoms", [atoms])
    require_ends("lasso.patches", "log10_strength", log10_strength, -8.0, 4.0)
    if split not in SPLITS:
        raise ValueError(f"lasso.patches: split, got {split!r}; valid: {', '.join(SPLITS)}.")
    held = images(data, 28)
    W, b = jnp.asarray(dictionary(data, atoms)), jnp.asarray(cut(data, split))
    constant, count = float(np.linalg.norm(np.asarray(W, np.float64), 2) ** 2), len(b)

    def sample(key: PRNGKeyArray) -> Patch:
        index_key, strength_key = jax.random.split(key)
        strength = 10.0 ** jax.random.uniform(strength_key, minval=log10_strength[0], maxval=log10_strength[1])
        return Patch(jax.random.randint(index_key, (), 0, count), strength, jnp.full_like(strength, constant))

    def smooth(params: Array, key: PRNGKeyArray, phi: Patch, batch: Known) -> Array:
        return 0.5 * jnp.sum((batch.W @ params - batch.b) ** 2)

    def loss(params: Array, key: PRNGKeyArray, phi: Patch, batch: Known) -> Array:
        return smooth(params, key, phi, batch) + phi.strength * jnp.sum(jnp.abs(params))

    return Task(
        data=Known(W, b),
        sample=sample,
        init=lambda key, phi: jnp.zeros(atoms, jnp.float32),
        batch=lambda key, phi, data, split: Known(data.W, data.b[phi.index]),
        loss=loss,
        name=f"lasso.patches({data}, {split}, {atoms} atoms, strength 10^{log10_strength[0]:g} to "
        f"10^{log10_strength[1]:g})",
        provenance=held.provenance,
        deterministic=True,
        composite=Composite(smooth, lambda phi: (phi.strength,), lambda phi: phi.lipschitz, optimum=_patches_optimum),
    )


@functools.lru_cache
def cut(data: str, split: Split, side: int = 8) -> Float[np.ndarray, "P m"]:
    """Patches of a split's images, on a grid without overlap."""
    held = images(data, 28)
    x = np.asarray(held.x[slice(*held.splits[split])], np.float64)
    count = 28 // side
    x = x[:, 2 : 2 + count * side, 2 : 2 + count * side].reshape(len(x), count, side, count, side)
    x = x.transpose(0, 1, 3, 2, 4).reshape(-1, side * side)
    x = x - x.mean(1, keepdims=True)
    x = x[np.mean(x * x, 1) > 1e-3]
    return x / np.sqrt(np.mean(x * x))


@functools.lru_cache
def dictionary(
    data: str, atoms: int, *, patches: int = 1000, rounds: int = 10, steps: int = 20
) -> Float[np.ndarray, "m n"]:
    """Columns of length 1 that patches of the training images are sparse in: codes and columns, in turns.

    Source: Engan, Aase & Husøy (1999), "Method of optimal directions for frame design", ICASSP; codes by FISTA.
    """
    rng = np.random.default_rng(0)
    x = cut(data, "train")
    x = x[rng.permutation(len(x))[:patches]].T
    W = x[:, rng.permutation(x.shape[1])[:atoms]] + 0.01 * rng.normal(size=(len(x), atoms))
    W, codes = W / np.linalg.norm(W, axis=0), np.zeros((atoms, x.shape[1]))
    for _ in range(rounds):
        step, y, t = 1 / np.linalg.norm(W, 2) ** 2, codes, 1.0
        for _ in range(steps):
            v = y - step * (W.T @ (W @ y - x))
            new = np.sign(v) * np.maximum(np.abs(v) - 0.5 * step, 0)
            following = (1 + np.sqrt(1 + 4 * t * t)) / 2
            codes, y, t = new, new + (t - 1) / following * (new - codes), following
        used = np.sum(codes * codes, 1) > 0
        gram = codes[used] @ codes[used].T + 1e-6 * np.eye(used.sum())
        W[:, used] = np.linalg.solve(gram, codes[used] @ x.T).T
        W = W / np.linalg.norm(W, axis=0)
    return W


def _patches_optimum(phi: Patch, data: Known) -> certified.Optimum:
    b = np.asarray(data.b)[np.asarray(phi.index)]
    W = np.broadcast_to(np.asarray(data.W), (len(b), *data.W.shape))
    return certified.minimum(certified.SQUARED, W, b, np.asarray(phi.strength))
