"""Persistent evolution strategies: unbiased meta-gradients from truncated unrolls.

Source: Vicol, Metz and Sohl-Dickstein (2021), "Unbiased gradient estimation in unrolled computation graphs with
persistent evolution strategies", arXiv:2112.13835, algorithm 2.

Differs from the paper: trajectories may end inside a window. A loss before the reset is weighted by the noise summed
since the previous reset, this window's included; a loss after it by this window's noise alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from meta_train.estimators.base import Estimate, Estimator
from meta_train.inner import Inner

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float


class State(NamedTuple):
    particles: Any  # [N, 2, ...] where theta has an influence, [N, ...] elsewhere
    xi: jax.Array  # [N, P] noise summed since the pair's last reset
    index: jax.Array  # [N] int32, global number of the pair


def gradient(
    before: Float[Array, " N"], after: Float[Array, " N"], xi: Float[Array, "N P"], eps: Float[Array, "N P"], std: float
) -> Float[Array, " P"]:
    """Mean over pairs of the antithetic estimate.

    Args:
      before: L(+) - L(-) summed over the window's steps up to the first reset, that step included.
      after: the same over the steps after it.
      xi: noise summed over the earlier windows of the trajectory.
      eps: this window's noise.
      std: of the noise.
    """
    weighted = before[:, None] * (xi + eps) + after[:, None] * eps
    return weighted.mean(0) / (2 * std**2)


def next_noise(
    xi: Float[Array, "N P"], eps: Float[Array, "N P"], was_reset: Bool[Array, " N"], at_end: Bool[Array, " N"]
) -> Float[Array, "N P"]:
    """Noise that perturbs the trajectories that go on: since their last reset, none if that was the last step's."""
    summed = jnp.where(was_reset[:, None], eps, xi + eps)
    return jnp.where(at_end[:, None], 0.0, summed)


def pes(inner: Inner, *, pairs: int = 8, std: float = 0.01, truncation: int = 50) -> Estimator:
    """Build the estimator.

    Args:
      inner: see `Inner`.
      pairs: N antithetic pairs of particles.
      std: of the perturbation of theta.
      truncation: K inner steps a window.

    Raises:
      ValueError: on an argument out of range.
    """
    if pairs < 1:
        raise ValueError(f"pes: pairs, got {pairs}; valid: >= 1.")
    if not std > 0:
        raise ValueError(f"pes: std, got {std}; valid: > 0.")
    if not 1 <= truncation <= inner.shortest:
        raise ValueError(
            f"pes: truncation, got {truncation}; valid: 1 to {inner.shortest}, the shortest horizon of an inner run."
        )
    axes = inner.theta_axes
    both_signs = jax.vmap(inner.step, in_axes=(0, axes, None), out_axes=(axes, 0, None, 0))
    step_all = jax.vmap(both_signs)

    def reset_all(keys: jax.Array) -> Any:
        fresh = jax.vmap(inner.reset)(keys)
        return _map_axes(lambda x: jnp.repeat(x[:, None], 2, axis=1), lambda x: x, axes, fresh)

    def init(key: jax.Array, theta: Any) -> State:
        index = jnp.arange(pairs, dtype=jnp.int32)
        noise = jnp.zeros((pairs, ravel_pytree(theta)[0].size), jnp.float32)
        return State(reset_all(_fold(key, index)), noise, index)

    def estimate(key: jax.Array, theta: Any, state: State) -> tuple[Estimate, State]:
        flat, unravel = ravel_pytree(theta)
        eps_keys, reset_keys, step_keys = jnp.moveaxis(
            jax.vmap(lambda k: jax.random.split(k, 3))(_fold(key, state.index)), 1, 0
        )
        eps = std * jax.vmap(lambda k: jax.random.normal(k, flat.shape, flat.dtype))(eps_keys)
        perturbed = jnp.stack([flat[None] + eps, flat[None] - eps], axis=1)
        thetas = jax.vmap(jax.vmap(unravel))(perturbed)
        # Inits are dear beside an inner step and a window resets a pair once unless it diverges: draw them once.
        fresh = reset_all(reset_keys)

        def body(carry, k):
            particles, before, after, was_reset, diverged = carry
            keys = jax.vmap(lambda key: jax.random.fold_in(key, k))(step_keys)
            particles, loss, done, bad = step_all(thetas, particles, keys)
            difference = loss[:, 0] - loss[:, 1]
            before = before + jnp.where(was_reset, 0.0, difference)
            after = after + jnp.where(was_reset, difference, 0.0)
            reset = done | bad.any(axis=1)
            particles = jax.lax.cond(reset.any(), lambda: _select(reset, fresh, particles), lambda: particles)
            carry = particles, before, after, was_reset | reset, diverged + bad.sum(dtype=jnp.int32)
            return carry, (loss.mean(), reset)

        zero = jnp.zeros(len(state.index), jnp.float32)
        start = (state.particles, zero, zero, zero > 0, jnp.zeros((), jnp.int32))
        (particles, before, after, was_reset, diverged), (losses, resets) = jax.lax.scan(
            body, start, jnp.arange(truncation)
        )
        grad = gradient(before, after, state.xi, eps, std) / truncation
        xi = next_noise(state.xi, eps, was_reset, resets[-1])
        result = Estimate(unravel(grad), losses.mean(), diverged, resets.sum(dtype=jnp.int32))
        return result, State(particles, xi, state.index)

    return Estimator(init, estimate)


def _fold(key: jax.Array, index: jax.Array) -> jax.Array:
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def _map_axes(on: Any, off: Any, axes: Any, tree: Any) -> Any:
    """Apply `on` to the leaves whose prefix in `axes` is 0 and `off` to the others."""
    return jax.tree.map(
        lambda axis, part: jax.tree.map(off if axis is None else on, part), axes, tree, is_leaf=lambda x: x is None
    )


def _select(mask: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(mask.reshape((-1,) + (1,) * (n.ndim - 1)), n, o), new, old)
