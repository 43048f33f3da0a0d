"""Methods for composite convex problems: learned and classical, and the gaps of their iterates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lopt
import tasks
from lopt import base, prox, proximal
from lopt.proximal_safeguard import last, safeguard
from meta_test import l2o_unrolled
from meta_test.l2o_problems import FLOOR, PATCHES, Instances, Problem
from tasks import lasso, logistic_l1
from tasks.base import Task

if TYPE_CHECKING:
    from jaxtyping import Float

TUNED_AT = (10, 50)
MOMENTA = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
NEAR, FAR = 100, 32  # an LSTM's iteration costs a hundred of FISTA's: after k = 100 these are the first instances alone
TOGETHER = 1 << 16  # elements of the matrices that are worked on at a time: what stays in a core's cache


class Method(NamedTuple):
    """An optimizer of instances.

    Fields:
      make: `(instance, **tuned) -> optax transform`; the instance is (phi, penalty, Lipschitz constant).
      proximal: whether gradients are those of the smooth part; otherwise subgradients of F.
      grid: of what is tuned, name -> ascending values; empty for nothing.
      far: instances at most beyond k = NEAR, where an iteration is dear; None for all.
      fits: `phi -> bool`, whether it can be used on a set; phi with a leading axis.
    """

    make: Callable[..., optax.GradientTransformation]
    proximal: bool = True
    grid: Mapping[str, Sequence[float]] = {}
    far: int | None = None
    fits: Callable[[Any], bool] = lambda phi: True


class Instance(NamedTuple):
    held: Any  # what has W and b: phi, or the batch of a task whose matrix is data
    prox: prox.Penalty
    lipschitz: Any  # ()


def classical(problem: Problem) -> dict[str, Method]:
    """The hand-designed methods, by name."""
    rates = tuple(float(f"{10.0**power:.3g}") for power in np.arange(-4, 1.01, 0.5))

    def both(one: Instance) -> dict[str, Any]:
        return {"lipschitz": one.lipschitz, "prox": one.prox}

    methods = {
        "ISTA": Method(lambda one: proximal.ista(**both(one))),
        "FISTA": Method(lambda one: proximal.fista(**both(one))),
        "FISTA, gradient restart": Method(lambda one: proximal.fista(**both(one), restart="gradient")),
        "FISTA, function restart": Method(lambda one: proximal.fista(**both(one), restart="function")),
        "momentum": Method(lambda one, a: proximal.momentum(**both(one), a=a), grid={"a": MOMENTA}),
        "Adam, subgradients": Method(lambda one, lr: optax.adam(lr), proximal=False, grid={"lr": rates}),
        "Adam-HD, subgradients": Method(
            lambda one, lr: proximal.adam_hd(lr=lr, beta=1e-4), proximal=False, grid={"lr": rates}
        ),
    }
    if problem.constrained:  # a set has no subgradients
        methods = {name: method for name, method in methods.items() if method.proximal}
    if problem.family == "logistic_l1":

        def soft(one: Instance) -> dict[str, Any]:
            return {"lipschitz": logistic_l1.paper_lipschitz(one.held.W), "prox": one.prox}

        methods["ISTA, the paper's constant"] = Method(lambda one: proximal.ista(**soft(one)))
        methods["FISTA, the paper's constant"] = Method(lambda one: proximal.fista(**soft(one)))
    if problem.family == "lasso":

        def solve(phi: Any, step: float) -> Callable[[Any, Any], Any]:
            gram, at_b = phi.W.T @ phi.W, phi.W.T @ phi.b
            inverse = jnp.linalg.inv(gram + jnp.eye(len(gram)) / step)  # once, and not in every iteration
            return lambda v, _: inverse @ (at_b + v / step)

        methods["ADMM"] = Method(
            lambda one, step: proximal.admm(prox_f=solve(one.held, step), prox=one.prox, step=step),
            grid={"step": (0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, 300.0, 1e3)},
        )
    return methods


def learned(source: str, steps: int = 100, far: int = FAR) -> dict[str, Method]:
    """A meta-trained rule, untuned, and with the safeguard, which hands over after so many steps at the latest.

    Raises ValueError or OSError for no artifact.
    """
    rule, theta = lopt.read(source)
    label = f"{rule.name}: {source}"
    if rule.needs - {"grad_fn"}:
        raise ValueError(
            f"lopt-eval l2o: {source} is {rule.name}, which needs {', '.join(sorted(rule.needs))}; valid: at most "
            "grad_fn."
        )
    if not base.proximal(rule):
        return {label: Method(lambda one: rule.bind(theta), proximal=False, far=far)}

    def bound(one: Instance) -> optax.GradientTransformationExtraArgs:
        return rule.bind(theta, prox=one.prox, lipschitz=one.lipschitz)

    return {
        label: Method(bound, far=far),
        f"{label}, safeguarded": Method(
            lambda one: safeguard(bound(one), prox=one.prox, lipschitz=one.lipschitz, steps=steps),
        ),
    }


def unrolled(problem: Problem, names: Sequence[str], cache: Path | None) -> dict[str, Method]:
    """Ada-LISTA trained on a LASSO problem's first set, for those of the sets with as many rows; LISTA on patches of
    the training images, for those of the test images, since it fits one matrix.
    """
    methods: dict[str, Method] = {}
    if problem.family != "lasso" or problem.constrained or "l2" in next(iter(problem.sets.values())).settings:
        return methods

    def method(name: str, task: Task, fits: Callable[[Any], bool]) -> None:
        theta = l2o_unrolled.trained(task, name, cache)
        methods[f"{name}, {l2o_unrolled.LAYERS} layers"] = Method(
            lambda one: l2o_unrolled.as_optax(l2o_unrolled.NETWORKS[name], theta, l2o_unrolled.seen(one)), fits=fits
        )

    first = next(iter(problem.sets))
    if first in names:
        with jax.enable_x64(False):  # as it is trained
            task = tasks.make("lasso", **problem.sets[first].settings)
        rows = jax.eval_shape(task.sample, jax.random.key(0)).W.shape[0]
        method("Ada-LISTA", task, lambda phi: hasattr(phi, "W") and phi.W.shape[1] == rows)
    for name in names:
        if problem.sets[name].family == PATCHES:
            with jax.enable_x64(False):
                own = tasks.make(PATCHES, **problem.sets[name].settings, split="train")
            method("LISTA", own, lambda phi: isinstance(phi, lasso.Patch))
    return methods


def together(task: Task, phi: Any) -> int:
    """How many instances are worked on at a time: a divisor of N, so that one program does for all."""
    count = len(jax.tree.leaves(phi)[0])
    size = max(int(leaf[0].size) for leaf in jax.tree.leaves(phi))
    most = max(1, min(count, TOGETHER // max(size, 1)))
    return max(d for d in range(1, most + 1) if count % d == 0)


def gaps(
    task: Task, method: Method, instances: Instances, at: Sequence[int], **tuned: Any
) -> Float[np.ndarray, "2 K N"]:
    """Relative gaps at y and x before the updates numbered `at`, from 0 and ascending."""
    composite = task.composite
    if composite is None:
        raise ValueError(f"lopt-eval l2o: {task.name} has no proximal structure; valid: a family with `composite`.")
    key, shown = jax.random.key(0), jnp.asarray(at)

    def one(phi: Any) -> Any:
        batch = task.batch(key, phi, task.data, "validation")
        whole = lambda x: task.loss(x, key, phi, batch)  # noqa: E731
        smooth = jax.grad(lambda x: composite.smooth(x, key, phi, batch))
        gradient = smooth if method.proximal else jax.grad(whole)
        held = phi if hasattr(phi, "W") else batch
        instance = Instance(held, prox.Penalty(composite.penalty(phi), composite.kind), composite.lipschitz(phi))
        tx = optax.with_extra_args_support(method.make(instance, **tuned))
        y = task.init(key, phi)
        y = y.astype(jnp.result_type(float, *(leaf for leaf in jax.tree.leaves(phi) if leaf.dtype.kind == "f")))

        def step(carry: Any, _: None) -> Any:
            y, state = carry
            updates, new = tx.update(gradient(y), state, y, value_fn=whole, grad_fn=gradient)
            return (optax.apply_updates(y, updates), new), (y, last(state, y))

        visited = jax.lax.scan(step, (y, tx.init(y)), None, length=int(at[-1]) + 1)[1]
        # F is asked for where it is shown alone: two products with the matrix an iteration less.
        return jnp.stack([jax.lax.map(whole, points[shown]) for points in visited])

    values = np.asarray(jax.jit(lambda phi: jax.lax.map(one, phi, batch_size=together(task, phi)))(instances.phi))
    relative = (np.moveaxis(values, 0, 2) - instances.best) / instances.best
    return np.maximum(np.where(np.isfinite(relative), relative, np.inf), FLOOR)


def curves(
    task: Task, method: Method, instances: Instances, at: Sequence[int], **tuned: Any
) -> Float[np.ndarray, "2 K N"]:
    """`gaps`; NaN of the instances after the method's `far` beyond NEAR."""
    count, near = len(instances.best), [k for k in at if k <= NEAR]
    if method.far is None or method.far >= count or len(near) == len(at):
        return gaps(task, method, instances, at, **tuned)
    first = jax.tree.map(lambda leaf: leaf[: method.far], instances.phi)
    out = np.full((2, len(at), count), np.nan)
    out[:, : len(near)] = gaps(task, method, instances, near, **tuned)
    out[:, :, : method.far] = gaps(task, method, Instances(first, instances.best[: method.far], 0.0), at, **tuned)
    return out


def tune(task: Task, method: Method, instances: Instances, point: int = 0) -> dict[int, dict[str, float]]:
    """For each k of TUNED_AT the value of the least mean gap at y, or at x (1), after k steps; {0: {}} where there is
    nothing to tune. Of values that are level there, as at the floor of gaps, the one that is ahead at the first k.
    """
    if not method.grid:
        return {0: {}}
    ((name, values),) = method.grid.items()
    found = [gaps(task, method, instances, TUNED_AT, **{name: value})[point].mean(1) for value in values]
    best = {k: min(range(len(values)), key=lambda v: (found[v][i], found[v][0])) for i, k in enumerate(TUNED_AT)}
    return {k: {name: float(values[v])} for k, v in best.items()}


def at_edge(method: Method, tuned: Mapping[str, float]) -> bool:
    """Whether a value is an end of its grid, beyond which a better one may lie; momentum has none below 0."""
    return any(value in (method.grid[name][0], method.grid[name][-1]) and value != 0 for name, value in tuned.items())
