"""The only file where a rule meets a task: one inner step, its meta-loss, and when an inner run ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt.base import LearnedOptimizer, unknown
from tasks.base import Task

META_LOSSES = ("train", "fresh", "validation")


class Particle(NamedTuple):
    """One inner trajectory."""

    params: Any  # inner weights
    opt_state: Any  # of the bound rule
    grad_state: Any  # of the task's grad_transform, () without one
    phi: Any  # task parameters
    t: jax.Array  # () int32, inner steps since reset
    horizon: jax.Array  # () int32, T: inner steps until the next reset


class Inner(NamedTuple):
    """What an estimator may know.

    Fields:
      reset: `key -> particle` at t = 0 with task, init and horizon drawn anew; the key is consumed.
      step: `(theta, particle, key) -> (particle, meta_loss (), done () bool, diverged () bool)`. `done` when
        the horizon is reached; `diverged` when the meta-loss is not finite, in which case it is replaced by
        its upper limit. The caller resets.
      theta_axes: a prefix tree of the particle: 0 where theta has an influence, None where it has none, for
        `vmap` over perturbations of theta: what they share is then computed once.
      shortest: the least horizon.
    """

    reset: Callable[[jax.Array], Any]
    step: Callable[[Any, Any, jax.Array], tuple[Any, jax.Array, jax.Array, jax.Array]]
    theta_axes: Any
    shortest: int


class Horizon(NamedTuple):
    """Horizons are log-uniform integers in [low, high]; equal ends make them constant."""

    low: int
    high: int

    def sample(self, key: jax.Array) -> jax.Array:
        """() int32."""
        if self.low == self.high:
            return jnp.asarray(self.low, jnp.int32)
        log = jax.random.uniform(key, minval=jnp.log(self.low), maxval=jnp.log(self.high + 1.0))
        return jnp.clip(jnp.exp(log).astype(jnp.int32), self.low, self.high)


def make_inner(
    rule: LearnedOptimizer, task: Task, *, horizon: Horizon, meta_loss: str = "validation", loss_limit: float = 3.0
) -> Inner:
    """Couple a rule and a task.

    Args:
      rule: its `bind` is called inside the step, with the particle's horizon as `num_steps`.
      task: `task.data` may be traced.
      horizon: of inner runs.
      meta_loss: the loss on the "train" batch of the step (before its update, at no cost), on a "fresh" training batch
        or on a "validation" batch (after the update).
      loss_limit: meta-losses above it, and non-finite ones, count as this much.

    Raises:
      ValueError: for an unknown meta_loss or a limit that is not positive.
    """
    if meta_loss not in META_LOSSES:
        raise unknown("meta_train.make_inner", "meta_loss", meta_loss, META_LOSSES)
    if not loss_limit > 0:
        raise ValueError(f"meta_train.make_inner: loss_limit, got {loss_limit}; valid: > 0.")
    value_and_grad = task.value_and_grad or jax.value_and_grad(task.loss)

    def bind(theta: Any, num_steps: Any) -> optax.GradientTransformationExtraArgs:
        # A trajectory that is no longer finite is reset by its estimator, so nothing need be skipped here.
        return rule.bind(theta, num_steps=num_steps, nonfinite="propagate", diagnostics=False)

    template = jax.eval_shape(rule.init_theta, jax.random.key(0))

    def reset(key: jax.Array) -> Particle:
        phi_key, init_key, horizon_key = jax.random.split(key, 3)
        phi = task.sample(phi_key)
        params = task.init(init_key, phi)
        steps = horizon.sample(horizon_key)
        # No state depends on theta's values, so zeros of its shapes do.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), template)
        grad_state = task.grad_transform.init(params) if task.grad_transform else ()
        return Particle(params, bind(zeros, steps).init(params), grad_state, phi, jnp.zeros((), jnp.int32), steps)

    def step(theta: Any, particle: Particle, key: jax.Array):
        batch_key, loss_key, meta_batch_key, meta_key = jax.random.split(key, 4)
        batch = task.batch(batch_key, particle.phi, task.data, "train")
        value, grads = value_and_grad(particle.params, loss_key, particle.phi, batch)
        grad_state = particle.grad_state
        if task.grad_transform:
            grads, grad_state = task.grad_transform.update(grads, grad_state, particle.params)
        tx = bind(theta, particle.horizon)
        updates, opt_state = tx.update(grads, particle.opt_state, particle.params, value=value)
        params = optax.apply_updates(particle.params, updates)
        if meta_loss != "train":
            split = "validation" if meta_loss == "validation" else "train"
            meta_batch = task.batch(meta_batch_key, particle.phi, task.data, split)
            value = task.loss(params, meta_key, particle.phi, meta_batch)
        diverged = ~jnp.isfinite(value)
        value = jnp.where(diverged, loss_limit, jnp.minimum(value, loss_limit))
        t = particle.t + 1
        moved = particle._replace(params=params, opt_state=opt_state, grad_state=grad_state, t=t)
        return moved, value, t >= particle.horizon, diverged

    axes: Any = Particle(0, 0, 0, phi=None, t=None, horizon=None)  # pyrefly: ignore
    return Inner(reset, step, axes, horizon.low)
