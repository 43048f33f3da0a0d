"""The optimizer of theta: any of optax's by name, and what meta-gradients need around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from lopt.base import unknown
from lopt.pretrained import named_leaves
from meta_train import config as cfg


def make(
    spec: cfg.MetaOptimizer, meta_steps: int, theta: Any, freeze: Sequence[str] = ()
) -> optax.GradientTransformation:
    """Clip, optimizer with its schedule, decoupled weight decay, a limit of the step; masked, accumulated.

    Args:
      spec: of the run.
      meta_steps: of the run; the schedule ends with it.
      theta: of the structure and names to be trained.
      freeze: parts of theta by dotted path that stay as they are: their update is masked, so that neither decay nor
        momentum moves them.

    Raises:
      ValueError: for an optimizer that optax does not have, a setting it does not take, or a part that is not in theta.
    """
    schedule = _schedule(spec, max(1, meta_steps // spec.accumulate))
    chain = [optax.clip_by_global_norm(spec.clip_norm)] if spec.clip_norm else []
    chain += [optax.clip(spec.clip)] if spec.clip else []
    chain.append(_by_name(spec, schedule))
    chain += [_decoupled_decay(schedule, spec.weight_decay)] if spec.weight_decay else []
    chain += [optax.clip(spec.clip_step)] if spec.clip_step else []
    tx = optax.chain(*chain)
    if freeze:
        labels = by_part("config.freeze", theta, dict.fromkeys(freeze, "freeze"), "train")
        tx = optax.multi_transform({"train": tx, "freeze": optax.set_to_zero()}, labels)
    if spec.accumulate == 1:
        return tx
    return optax.MultiSteps(tx, spec.accumulate).gradient_transformation()


def average(ema: Any, theta: Any, opt: Any, spec: cfg.MetaOptimizer) -> Any:
    """decay · ema + (1 - decay) · theta where the update that made `theta` and `opt` moved theta.

    A meta-step whose gradient is only accumulated does not move it. Nothing where there is no average.
    """
    if not spec.ema:
        return ema
    moved = opt.mini_step == 0 if spec.accumulate > 1 else True
    return jax.tree.map(lambda old, new: jnp.where(moved, spec.ema * old + (1 - spec.ema) * new, old), ema, theta)


def by_part(where: str, theta: Any, values: Mapping[str, Any], default: Any) -> Any:
    """A tree like theta of the values given for its parts by dotted path; the longest path that fits counts.

    Raises:
      ValueError: if a path names nothing in theta.
    """
    names = list(named_leaves(theta))
    for part in values:
        if not any(f"{name}.".startswith(f"{part}.") for name in names):
            raise unknown(where, "part of theta", part, {name.split(".")[0] for name in names} | set(names))

    def value(name: str) -> Any:
        fitting = [part for part in values if f"{name}.".startswith(f"{part}.")]
        return values[max(fitting, key=len)] if fitting else default

    return jax.tree.unflatten(jax.tree.structure(theta), [value(name) for name in names])


def _schedule(spec: cfg.MetaOptimizer, updates: int) -> optax.Schedule:
    """Warm-up from 0 to lr, then to final_lr at the last update."""
    warmup = min(spec.warmup, updates - 1)
    if spec.schedule == "cosine" and warmup == 0:
        return optax.cosine_decay_schedule(spec.lr, updates, spec.final_lr / spec.lr)
    if spec.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, spec.lr, warmup, updates, spec.final_lr)
    end = spec.final_lr if spec.schedule == "linear" else spec.lr
    rest = optax.linear_schedule(spec.lr, end, updates - warmup)
    return optax.join_schedules([optax.linear_schedule(0.0, spec.lr, warmup), rest], [warmup]) if warmup else rest


# What they want besides a schedule and gradients, or instead.
NUMBER, VALUE = "a number for a learning rate", "the loss beside the gradient"
UNFIT = {
    "dpsgd": "gradients of each example",
    "lbfgs": "the loss at other points",
    "momo": VALUE,
    "momo_adam": VALUE,
    "optimistic_adam": NUMBER,
    "rprop": NUMBER,
    "schedule_free": "another optimizer inside",
    "schedule_free_adamw": "that its average is exported (meta_optimizer.ema keeps one for any other)",
    "schedule_free_sgd": "that its average is exported (meta_optimizer.ema keeps one for any other)",
    "sm3": NUMBER,
    "sophia": "the loss at other points",
}


def optimizers() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """Factories by name: those of optax and optax.contrib that a schedule and gradients are enough for."""
    found = {}
    for module in (contrib, optax):  # of one name, the one that has left contrib
        for name in dir(module):
            if not name.startswith(("_", "scale_by_")) and name not in UNFIT:
                factory = getattr(module, name)
                if _takes_learning_rate(factory):
                    found[name] = factory
    return found


def _by_name(spec: cfg.MetaOptimizer, schedule: optax.Schedule) -> optax.GradientTransformation:
    names = optimizers()
    if spec.name in UNFIT:
        raise ValueError(
            f"config.meta_optimizer.name, got {spec.name}, which wants {UNFIT[spec.name]}; valid: {', '.join(names)}."
        )
    if spec.name not in names:
        raise unknown("config.meta_optimizer.name", "optimizer", spec.name, names)
    factory = names[spec.name]
    takes = set(inspect.signature(factory).parameters) - {"learning_rate"}
    for name in spec.settings:
        if name not in takes:
            raise unknown(f"config.meta_optimizer.settings: {spec.name}", "setting", name, takes)
    try:
        return factory(schedule, **spec.settings)
    except TypeError as e:
        raise ValueError(f"config.meta_optimizer.settings, got {dict(spec.settings)}: {e}.") from e


def _takes_learning_rate(f: Any) -> bool:
    if not (inspect.isfunction(f) or isinstance(f, partial)):  # nadam is adam with an argument
        return False
    return next(iter(inspect.signature(f).parameters), "") == "learning_rate"


def _decoupled_decay(schedule: optax.Schedule, decay: float) -> optax.GradientTransformation:
    """Subtract lr · decay · theta, whatever the optimizer before it makes of gradients."""

    def update(updates, state, params=None):
        rate = schedule(state) * decay
        return jax.tree.map(lambda u, p: u - rate * p, updates, params), optax.safe_increment(state)

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
