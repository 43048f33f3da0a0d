"""Quadratics with chosen spectra in a random basis, with additive gradient noise."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tasks.base import Split, Task
from tasks.space import Choice, LogFloat, LogInt
from tasks.supervised import require_positive, split_index

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PRNGKeyArray

SPACE = {
    "dim": LogInt(2, 64),
    "spectrum": Choice(("geometric", "power", "clusters", "marchenko_pastur")),
    "condition": LogFloat(1e1, 1e4),
    "log10_noise": Choice(((-4.0, -2.0), (-2.0, -0.5))),
}


class Phi(NamedTuple):
    """Task parameters."""

    hessian: Float[Array, "D D"]  # symmetric, positive definite
    noise: Float[Array, ""]  # standard deviation of the gradient's noise, along each axis


def spectrum_named(name: str, dim: int, condition: float) -> np.ndarray:
    """[D] eigenvalues in descending order, the largest 1 and the smallest 1/condition.

    geometric: equally spaced logarithms. power: i^-a. clusters: one in eight large, the others small, as the Hessians
    of classifiers have them (Sagun et al., 2017). marchenko_pastur: quantiles of its density, that of a Wishart matrix.
    """
    rank = np.arange(1, dim + 1)
    if dim == 1:
        return np.ones(1)
    if name == "geometric":
        return condition ** (-(rank - 1) / (dim - 1))
    if name == "power":
        return rank ** (-math.log(condition) / math.log(dim))
    if name == "clusters":
        return np.where(rank <= max(dim // 8, 1), 1.0, 1 / condition)
    root = math.sqrt(condition)  # of the support's ends: ((1 + sqrt c) / (1 - sqrt c))**2 = condition
    ratio = ((root - 1) / (root + 1)) ** 2
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    x = np.linspace(low, high, 4097)
    density = np.sqrt(np.maximum((high - x) * (x - low), 0)) / x
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return np.interp(np.linspace(1, 0, dim), mass / mass[-1], x) / high


SPECTRA = ("geometric", "power", "clusters", "marchenko_pastur")


def quadratic(
    *,
    dim: int = 32,
    spectrum: str = "geometric",
    condition: float = 100.0,
    log10_noise: tuple[float, float] | None = (-3.0, -1.0),
) -> Task:
    """x·H·x / 2 + noise·z·x, where H has a chosen spectrum in a random basis and z is drawn a batch.

    Batches of validation and test have no noise, so that their loss is the excess over the minimum. Inits are normal.

    Args:
      dim: D.
      spectrum: geometric, power, clusters or marchenko_pastur, see `spectrum_named`.
      condition: largest over smallest eigenvalue, ≥ 1; the largest is 1.
      log10_noise: range of the noise's log10; phi draws from it uniformly. None: no noise, the task is deterministic.

    Raises ValueError for an invalid setting, naming the valid ones.
    """
    require_positive("quadratic", "dim", [dim])
    if spectrum not in SPECTRA:
        raise ValueError(f"quadratic: spectrum, got {spectrum!r}; valid: {', '.join(SPECTRA)}.")
    if not 1 <= condition <= 1e6:
        raise ValueError(f"quadratic: condition, got {condition}; valid: 1 to 1e6.")
    if log10_noise is not None and (len(log10_noise) != 2 or not -20.0 <= log10_noise[0] <= log10_noise[1] <= 20.0):
        raise ValueError(f"quadratic: log10_noise, got {log10_noise}; valid: a range (low, high) in ± 20, or None.")
    eigenvalues = spectrum_named(spectrum, dim, condition).astype(np.float32)

    def sample(key: PRNGKeyArray) -> Phi:
        basis_key, noise_key = jax.random.split(key)
        basis, _ = jnp.linalg.qr(jax.random.normal(basis_key, (dim, dim)))
        hessian = (basis * jnp.asarray(eigenvalues)[None]) @ basis.T
        if log10_noise is None:
            return Phi(hessian, jnp.zeros(()))
        exponent = jax.random.uniform(noise_key, minval=log10_noise[0], maxval=log10_noise[1])
        return Phi(hessian, 10.0**exponent)

    def batch(key: PRNGKeyArray, phi: Phi, data: Any, split: Split) -> Float[Array, " D"]:
        z = jax.random.normal(key, (dim,))
        return phi.noise * z if split_index(split) == 0 else jnp.zeros_like(z)

    def loss(params: Float[Array, " D"], key: PRNGKeyArray, phi: Phi, batch: Float[Array, " D"]) -> Float[Array, ""]:
        return 0.5 * params @ phi.hessian @ params + batch @ params

    noise = "no noise" if log10_noise is None else f"noise 10^{log10_noise[0]:g} to 10^{log10_noise[1]:g}"
    return Task(
        data=(),
        sample=sample,
        init=lambda key, phi: jax.random.normal(key, (dim,)),
        batch=batch,
        loss=loss,
        name=f"quadratic({dim}, {spectrum}, condition {condition:g}, {noise})",
        init_loss=0.5 * float(eigenvalues.sum()),
        deterministic=log10_noise is None,
    )
