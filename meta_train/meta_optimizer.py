"""The optimizer of theta: any of optax's by name, and what meta-gradients need around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, wraps
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
) -> optax.GradientTransformationExtraArgs:
    """Clip, optimizer with its schedule, decoupled weight decay, limits of the step; masked, accumulated.

    Its update is given the meta-loss as `value=`, which some optimizers ask for.

    Args:
      spec: of the run.
      meta_steps: of the run; the schedule ends with it.
      theta: of the structure and names to be trained.
      freeze: parts of theta by dotted path that stay as they are: their update is masked, so that neither decay nor
        momentum moves them.

    Raises:
      ValueError: for an optimizer that optax does not have, a setting it does not take, or a part that is not in theta.
    """
    schedule = _schedule(spec, updates(spec, meta_steps))
    chain = [optax.clip_by_global_norm(spec.clip_norm)] if spec.clip_norm else []
    chain += [optax.clip(spec.clip)] if spec.clip else []
    chain.append(_by_name(spec, schedule))
    chain += [_decoupled_decay(schedule, spec.weight_decay)] if spec.weight_decay else []
    chain += [optax.clip_by_global_norm(spec.clip_step_norm)] if spec.clip_step_norm else []
    chain += [optax.clip(spec.clip_step)] if spec.clip_step else []
    tx = optax.chain(*chain)
    if freeze:
        labels = by_part("config.freeze", theta, dict.fromkeys(freeze, "freeze"), "train")
        if "train" not in jax.tree.leaves(labels):
            raise ValueError(f"config.freeze, got {list(freeze)}, which is all of theta; valid: a part of it.")
        tx = optax.multi_transform({"train": tx, "freeze": optax.set_to_zero()}, labels)
    if spec.accumulate > 1:
        tx = optax.MultiSteps(tx, spec.accumulate).gradient_transformation()
    return optax.with_extra_args_support(tx)


def updates(spec: cfg.MetaOptimizer, meta_steps: int) -> int:
    """How many times a run moves theta."""
    return max(1, meta_steps // spec.accumulate)


def warmup(wanted: int, updates: int) -> int:
    """A warm-up is at most all of a run's updates but the last."""
    return min(wanted, updates - 1)


def shorter_warmup(where: str, wanted: int, updates: int) -> Iterator[str]:
    """What a run says of a warm-up that it has not the length for."""
    if (got := warmup(wanted, updates)) < wanted:
        yield f"{where} {wanted} is longer than the run: it is {got} here"


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
    rising = warmup(spec.warmup, updates)
    if spec.schedule == "cosine" and rising == 0:
        return optax.cosine_decay_schedule(spec.lr, updates, spec.final_lr / spec.lr)
    if spec.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, spec.lr, rising, updates, spec.final_lr)
    end = spec.final_lr if spec.schedule == "linear" else spec.lr
    rest = optax.linear_schedule(spec.lr, end, updates - rising)
    return optax.join_schedules([optax.linear_schedule(0.0, spec.lr, rising), rest], [rising]) if rising else rest


OTHER_POINTS, NO_RATE, SCALARS = "the loss at other points", "no learning rate", "no scalars, which theta has"
UNFIT = {  # what they want that a run does not have
    "dpsgd": "gradients of each example",
    "lbfgs": OTHER_POINTS,
    "optimistic_adam": "a number for a learning rate; optimistic_adam_v2 takes a schedule",
    "polyak_sgd": f"{NO_RATE}; scale_by_polyak takes one",
    "scale_by_backtracking_linesearch": OTHER_POINTS,
    "scale_by_distance_over_gradients": SCALARS,
    "scale_by_learning_rate": f"{NO_RATE}: it is one",
    "scale_by_madgrad": "its learning rate inside; madgrad has it",
    "scale_by_muon": "to be told matrices from other tensors; muon does",
    "scale_by_rprop": "its learning rate inside; rprop has it",
    "scale_by_schedule": f"{NO_RATE}: it is one",
    "scale_by_sm3": SCALARS,
    "scale_by_zoom_linesearch": OTHER_POINTS,
    "schedule_free": "another optimizer inside",
    "schedule_free_adamw": "that its average is exported (meta_optimizer.ema keeps one for any other)",
    "schedule_free_sgd": "that its average is exported (meta_optimizer.ema keeps one for any other)",
    "sm3": SCALARS,
    "sophia": OTHER_POINTS,
}
SHARES = ("b1", "b2", "b3", "momentum")  # settings that are decays of averages, whatever the optimizer
SMALL = {name: jax.ShapeDtypeStruct(x, "float32") for name, x in dict(matrix=(2, 3), vector=(2,), scalar=()).items()}


def optimizers() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """Factories by name, each of a learning rate and settings: those of optax and optax.contrib.

    What is called scale_by_… there is followed by the learning rate.
    """
    found = {}
    for module in (contrib, optax):  # of one name, the one that has left contrib
        for name in dir(module):
            factory = getattr(module, name)
            if name.startswith("_") or name in UNFIT:
                continue
            if name.startswith("scale_by_") and inspect.isfunction(factory):
                found[name] = _followed_by_rate(factory)
            elif _takes_learning_rate(factory):
                found[name] = factory
    return found


def _followed_by_rate(scale_by: Callable[..., optax.GradientTransformation]) -> Callable[..., Any]:
    @wraps(scale_by)
    def factory(learning_rate, **settings):
        return optax.chain(scale_by(**settings), optax.scale_by_learning_rate(learning_rate))

    return factory


def _by_name(spec: cfg.MetaOptimizer, schedule: optax.Schedule) -> optax.GradientTransformation:
    names, where = optimizers(), "config.meta_optimizer"
    if spec.name in UNFIT:
        raise ValueError(f"{where}.name, got {spec.name}, which wants {UNFIT[spec.name]}; valid: {', '.join(names)}.")
    if spec.name not in names:
        raise unknown(f"{where}.name", "optimizer", spec.name, names)
    takes = set(inspect.signature(names[spec.name]).parameters) - {"learning_rate"}
    for name, value in spec.settings.items():
        here = f"{where}.settings: {spec.name}"
        if name not in takes:
            raise unknown(here, "setting", name, takes)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name in SHARES and value is not None and not (number and 0 <= value < 1):
            raise ValueError(f"{here}: {name}, got {value!r}; valid: a number in [0, 1).")
    # Rprop's learning rate is the length of its first step, and a number.
    rate = spec.lr if spec.name == "rprop" else schedule
    try:
        tx = optax.with_extra_args_support(names[spec.name](rate, **spec.settings))
        jax.eval_shape(tx.update, SMALL, jax.eval_shape(tx.init, SMALL), SMALL, value=SMALL["scalar"])
    except Exception as e:  # of whatever kind what it does not understand leads to
        raise ValueError(
            f"{where}.settings, got {dict(spec.settings)}: {type(e).__name__}: {str(e)[:200]}; valid: what optax's "
            f"{spec.name} takes: {', '.join(sorted(takes))}."
        ) from e
    return tx


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
