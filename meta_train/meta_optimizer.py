"""The optimizer of theta: any of optax's by name, and what meta-gradients need around it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

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


def average(ema: Any, theta: Any, decay: float) -> Any:
    """decay · ema + (1 - decay) · theta; nothing where there is no average."""
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, theta) if decay else ema


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


# They want a number for a learning rate, or more than gradients.
UNFIT = ("lbfgs", "optimistic_adam", "rprop", "scale_by_rprop", "sm3")


def _by_name(spec: cfg.MetaOptimizer, schedule: optax.Schedule) -> optax.GradientTransformation:
    names = [
        name
        for name in dir(optax)
        if _takes_learning_rate(getattr(optax, name)) and name not in UNFIT and not name.startswith("_")
    ]
    if spec.name not in names:
        raise unknown("config.meta_optimizer.name", "optimizer", spec.name, names)
    factory = getattr(optax, spec.name)
    takes = set(inspect.signature(factory).parameters) - {"learning_rate"}
    for name in spec.settings:
        if name not in takes:
            raise unknown(f"config.meta_optimizer.settings: {spec.name}", "setting", name, takes)
    try:
        return factory(schedule, **spec.settings)
    except TypeError as e:
        raise ValueError(f"config.meta_optimizer.settings, got {dict(spec.settings)}: {e}.") from e


def _takes_learning_rate(f: Any) -> bool:
    try:
        return inspect.isfunction(f) and next(iter(inspect.signature(f).parameters), "") == "learning_rate"
    except ValueError:
        return False


def _decoupled_decay(schedule: optax.Schedule, decay: float) -> optax.GradientTransformation:
    """Subtract lr · decay · theta, whatever the optimizer before it makes of gradients."""

    def update(updates, state, params=None):
        rate = schedule(state) * decay
        return jax.tree.map(lambda u, p: u - rate * p, updates, params), optax.safe_increment(state)

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
