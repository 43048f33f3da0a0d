"""From per-tensor arithmetic to an optax transform: what every rule shares and no rule repeats.

A rule is written on a list of float leaves of rank >= 1. This file turns it into a
`optax.GradientTransformationExtraArgs`: None and masked leaves pass through, scalars act as shape (1,),
low-precision parameters are computed in float32, a non-finite gradient skips its leaf, and `lr`,
`weight_decay` and `schedule` mean the same for each rule: u = -lr · schedule(t) · (direction + weight_decay · p).
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt import explicit
from lopt.base import LearnedOptimizer, unknown

Schedule = Callable[[jax.Array, Any], Any]
Labels = Callable[[str, Any], str | Iterable[str] | None] | None
Nonfinite = Literal["skip_leaf", "skip_tree", "propagate"]
FLOATS = ("float16", "bfloat16", "float32", "float64")
NONFINITE = ("skip_leaf", "skip_tree", "propagate")
LABELS = ("embedding", "output", "no_decay", "freeze")


class Leaf(NamedTuple):
    """What is known of a parameter tensor before it is traced."""

    path: str  # "/"-joined key path, e.g. "layer0/w"
    shape: tuple[int, ...]  # scalars are (1,)
    labels: frozenset[str]

    @property
    def group(self) -> str:
        """Its labels joined by "+", or "matrix" or "vector" by its rank."""
        return "+".join(sorted(self.labels)) or ("matrix" if len(self.shape) > 1 else "vector")


class Told(NamedTuple):
    """What an update is told besides gradients and parameters."""

    count: jax.Array  # () int32, updates applied before this one
    num_steps: Any  # horizon in updates: int, () array, or None
    value: jax.Array | None  # () loss at the parameters, or None


class State(NamedTuple):
    """Optimizer state; every array is float32 (float64 for float64 parameters) but the counters."""

    count: jax.Array  # () int32, updates so far
    skipped: jax.Array  # () int32, leaf updates skipped because their gradient was not finite
    leaves: Any  # like params: the rule's state of each tensor
    shared: Any  # the rule's state across tensors, () if it has none
    update_rms: Any  # dict of () root mean squares of the last update, by label (see `Leaf.group`)


class Arithmetic(NamedTuple):
    """A rule on lists of leaves.

    init_leaf: `(Leaf, p) -> state of the tensor`.
    update: `(leaves, grads, states, params, shared, told) -> (directions, states, shared)`; parameters move
      along minus the direction.
    init_shared: `leaves -> state across tensors`.
    clean: `gradient -> gradient`, before it is asked whether it is finite.
    decay: `(Leaf, weight_decay) -> weight decay of the tensor`, what `bind` was given unless an original has its own.
    """

    init_leaf: Callable[[Leaf, jax.Array], Any]
    update: Callable[..., tuple[list[Any], list[Any], Any]]
    init_shared: Callable[[list[Leaf]], Any] = lambda leaves: ()
    clean: Callable[[jax.Array], jax.Array] = lambda g: g
    decay: Callable[[Leaf, Any], Any] = lambda leaf, weight_decay: weight_decay


def per_leaf(update_leaf: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[list[Any], list[Any], Any]]:
    """Lift `(leaf, g, state, p, told) -> (direction, state)` to the list form of `Arithmetic.update`."""

    def update(leaves, grads, states, params, shared, told):
        out = [update_leaf(*xs, told) for xs in zip(leaves, grads, states, params, strict=True)]
        return [direction for direction, _ in out], [state for _, state in out], shared

    return update


def constant(count, num_steps):
    return 1.0


def cosine(count, num_steps):
    """½(1 + cos(π t/T)), held at 0 past the horizon T = num_steps."""
    if num_steps is None:
        raise ValueError("schedule='cosine': num_steps is None; pass num_steps= (the horizon in updates).")
    fraction = jnp.minimum(count / jnp.maximum(num_steps, 1), 1.0)
    return 0.5 * (1.0 + jnp.cos(jnp.pi * fraction))


SCHEDULES: dict[str, Schedule] = {"constant": constant, "cosine": cosine}


def define(
    name: str,
    settings: Mapping[str, Any],
    init_theta: Callable[[jax.Array], Any],
    arithmetic: Callable[[Any], Arithmetic],
    *,
    needs: Iterable[str] = (),
    lr: float = 1.0,
    schedule: str = "constant",
    decay_after: bool = False,
) -> LearnedOptimizer:
    """The `LearnedOptimizer` of a rule; the last line of every rule's factory.

    Args:
      name: of the rule.
      settings: see `LearnedOptimizer`.
      init_theta: see `LearnedOptimizer`.
      arithmetic: `theta -> Arithmetic`.
      needs: see `LearnedOptimizer`.
      lr: the rule's own default.
      schedule: the rule's own default.
      decay_after: decay the moved parameters, p ← (p + u)(1 - lr · weight_decay), as some originals do.
    """
    needed = frozenset(needs)
    default_lr, default_schedule = lr, schedule

    def bind(
        theta: Any,
        *,
        num_steps: Any = None,
        lr: Any = None,
        weight_decay: Any = 0.0,
        schedule: str | Schedule | None = None,
        labels: Labels = None,
        multipliers: Any = None,
        nonfinite: Nonfinite = "skip_leaf",
        diagnostics: bool = True,
    ) -> optax.GradientTransformationExtraArgs:
        return as_optax(
            name,
            arithmetic,
            theta,
            needs=needed,
            num_steps=num_steps,
            lr=default_lr if lr is None else lr,
            weight_decay=weight_decay,
            schedule=default_schedule if schedule is None else schedule,
            labels=labels,
            multipliers=multipliers,
            nonfinite=nonfinite,
            diagnostics=diagnostics,
            decay_after=decay_after,
        )

    return LearnedOptimizer(name, settings, needed, init_theta, bind)


def as_optax(
    name: str,
    arithmetic: Callable[[Any], Arithmetic],
    theta: Any,
    *,
    needs: frozenset[str],
    num_steps: Any,
    lr: Any,
    weight_decay: Any,
    schedule: str | Schedule,
    labels: Labels,
    multipliers: Any,
    nonfinite: Nonfinite,
    diagnostics: bool,
    decay_after: bool,
) -> optax.GradientTransformationExtraArgs:
    """Make the optax transform of a rule whose theta is bound.

    Args:
      name: of the rule, for messages.
      arithmetic: `theta -> Arithmetic`.
      theta: its meta-parameters.
      needs: what the update demands ("value": the loss, passed as `value=`; "num_steps": the horizon).
      num_steps: horizon in updates, static or traced, or None where the rule does not need one.
      lr: multiplies the final direction; a number or a traced scalar.
      weight_decay: decoupled, multiplied by lr and the schedule.
      schedule: "constant", "cosine", or a function of (count, num_steps) returning a factor of lr.
      labels: `(path, leaf) -> label(s)` out of LABELS, or None for nothing special.
      multipliers: tree like params of factors of each tensor's direction (muP's: `lopt.mup.multipliers`), or None. The
        decay is not scaled, unless `decay_after` (where lr itself is scaled, as in the original).
      nonfinite: what a gradient element that is NaN or infinite, or a sum of squares that is, skips: its "skip_leaf",
        the "skip_tree", or nothing ("propagate": the rule sees it). For a rule that needs the loss, one that is not
        finite skips the whole step.
      diagnostics: keep `State.update_rms`.
      decay_after: see `define`.

    Raises:
      ValueError: on a bad argument, naming it, its value and the valid choices.
    """
    where = f"lopt.rules.{name}"
    _check(where, needs, num_steps, lr, weight_decay, schedule, labels, nonfinite)
    unit_schedule = SCHEDULES[schedule] if isinstance(schedule, str) else schedule

    def describe(params) -> list[Leaf | None]:
        """One entry a leaf of params; None where nothing is to be done (frozen or empty leaves)."""
        return [_describe(where, path, p, labels) for path, p in jax.tree_util.tree_leaves_with_path(params)]

    def init(params) -> State:
        return _explicit(start, params, None, theta, params)

    def start(theta, params) -> State:
        rule = arithmetic(theta)
        leaves, treedef = jax.tree.flatten(params)
        about = describe(params)
        states = [None if a is None else rule.init_leaf(a, _wide(p)) for a, p in zip(about, leaves, strict=True)]
        live = [a for a in about if a is not None]
        rms = {a.group: jnp.zeros((), jnp.float32) for a in live} if diagnostics else None
        zero = jnp.zeros((), jnp.int32)
        return _apart(State(zero, zero, treedef.unflatten(states), rule.init_shared(live), rms))

    def step_of(p, direction, rate, factor, decay):
        """-rate · (factor · direction + decay · p)."""
        step = -rate * factor * direction
        if isinstance(decay, numbers.Number) and decay == 0:
            return step
        moved, scale = (p + step, factor) if decay_after else (p, 1.0)
        return step - rate * scale * decay * moved

    def update(updates, state, params=None, *, value=None, **extra_args):
        del extra_args  # optax's convention: a transform ignores what it does not need
        told = Told(state.count, num_steps, _loss(where, needs, params, value))
        factors = _factors(where, params, multipliers)
        return _explicit(apply, params, state, theta, (lr, weight_decay, factors), told, updates, state, params)

    def apply(theta, hyper, told, updates, state, params):
        (lr, weight_decay, factors), rule = hyper, arithmetic(theta)
        p_leaves, treedef = jax.tree.flatten(params)
        g_leaves, states = treedef.flatten_up_to(updates), treedef.flatten_up_to(state.leaves)
        live = {i: a for i, a in enumerate(describe(params)) if a is not None}
        leaves = list(live.values())
        p, g, s = [_wide(p_leaves[i]) for i in live], [g_leaves[i] for i in live], [states[i] for i in live]
        # A tensor without a gradient stays where it is, but a rule across tensors still sees all of them.
        missing = [x is None for x in g]
        g = [jnp.zeros_like(y) if x is None else _wide(x).astype(y.dtype) for x, y in zip(g, p, strict=True)]
        g = [rule.clean(x) for x in g]
        ok = _finite(g, nonfinite)
        if ok is not None:
            ok, g, told = _without_nonfinite(ok, g, told)
        directions, new_s, shared = [], [], state.shared
        if leaves:
            directions, new_s, shared = rule.update(leaves, g, s, p, state.shared, told)
        count, skipped = state.count + 1, state.skipped
        shared = jax.tree.map(lambda n, o: n.astype(o.dtype), shared, state.shared)
        if ok is not None:
            # A step that every tensor skips did not happen: neither clock nor shared state moves on.
            happened = jnp.any(jnp.stack(ok))
            shared = _select(happened, shared, state.shared)
            new_s = [_select(*xs) for xs in zip(ok, new_s, s, strict=True)]
            count = state.count + happened.astype(jnp.int32)
            skipped = skipped + sum((1 - k.astype(jnp.int32) for k in ok), jnp.zeros((), jnp.int32))
        rate = lr * unit_schedule(state.count, told.num_steps)
        out, steps = [_nothing(x) for x in p_leaves], []
        for j, i in enumerate(live):
            if missing[j]:
                steps.append(jnp.zeros_like(p[j]))
                continue
            decay = 0 if "no_decay" in leaves[j].labels else rule.decay(leaves[j], weight_decay)
            step = step_of(p[j], directions[j], rate, factors[i], decay)
            steps.append(step if ok is None else jnp.where(ok[j], step, 0.0))
            out[i] = steps[j].reshape(out[i].shape).astype(out[i].dtype)
            states[i] = new_s[j]
        rms = _rms_by_group(leaves, steps) if diagnostics else None
        return treedef.unflatten(out), State(count, skipped, treedef.unflatten(states), shared, rms)

    return optax.GradientTransformationExtraArgs(init, update)


def _apart(state: State) -> State:
    """No array twice: a state that is donated may not share buffers with itself."""
    seen: set[int] = set()
    return jax.tree.map(lambda x: jnp.copy(x) if id(x) in seen or seen.add(id(x)) else x, state)


def _explicit(f: Callable[..., Any], params: Any, state: State | None, *args: Any) -> Any:
    """f of args, with automatic axes where the parameters' mesh has explicit ones (see `lopt.explicit`)."""
    mesh = explicit.mesh_of(params)
    if mesh is None:
        return f(*args)
    # Python's numbers stay what they are; arrays must be arguments, for what f closes over keeps explicit axes.
    leaves, treedef = jax.tree.flatten(args)
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}

    def with_arrays(given: dict[int, Any]) -> Any:
        return f(*treedef.unflatten([given.get(i, x) for i, x in enumerate(leaves)]))

    like = state
    if like is None:
        like = jax.eval_shape(with_arrays, explicit.without_sharding(arrays))
    out = explicit.replicated(mesh, like)._replace(leaves=explicit.shardings(mesh, params, like.leaves))
    out = out if state is None else (explicit.shardings(mesh, params, params), out)

    def anchored(given: dict[int, Any]) -> Any:
        # A new state does not depend on the parameters' values; without them jit would not know the devices.
        return jax.lax.optimization_barrier((with_arrays(given), given))[0]

    return jax.sharding.auto_axes(anchored, out_sharding=out)(arrays)


def _factors(where: str, params: Any, multipliers: Any) -> list[Any]:
    """One a leaf of the parameters, by path: inside `optax.masked` these are fewer than the multipliers."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if multipliers is None:
        return [1.0] * len(paths)
    by_path = dict(jax.tree_util.tree_leaves_with_path(multipliers))
    for path in paths:
        if path not in by_path:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"{where}: multipliers has no {name!r}; valid: a tree like the parameters.")
    return [by_path[path] for path in paths]


def _nothing(p: Any) -> Any:
    """The update of a parameter that stays."""
    if jax.dtypes.issubdtype(jax.typeof(p).dtype, jax.dtypes.extended):  # PRNG keys have no zero
        return jnp.zeros(jnp.shape(p), jax.dtypes.float0)
    return jnp.zeros_like(jnp.asarray(p))


def _check(where: str, needs: frozenset[str], num_steps, lr, weight_decay, schedule, labels, nonfinite) -> None:
    """Refuse arguments of `bind` that mean nothing."""
    if "num_steps" in needs and num_steps is None:
        raise ValueError(f"{where}: num_steps is None; this rule needs the horizon: pass num_steps=<total updates>.")
    if num_steps is not None and not isinstance(num_steps, jax.core.Tracer):
        whole = np.ndim(num_steps) == 0 and np.issubdtype(np.asarray(num_steps).dtype, np.integer)
        if not (whole and 1 <= int(num_steps) < 2**31):
            raise ValueError(f"{where}: num_steps, got {num_steps!r}; valid: an integer >= 1.")
    for key, got in {"lr": lr, "weight_decay": weight_decay}.items():
        if callable(got):
            hint = "schedule=lambda count, num_steps: factor of lr, or optax.inject_hyperparams"
            raise ValueError(f"{where}: {key}, got a function; valid: a number, with {hint}.")
        traced = isinstance(got, jax.core.Tracer)  # and cannot be asked
        if not (jnp.shape(got) == () if traced else _at_least_0(got)):
            raise ValueError(f"{where}: {key}, got {got!r}; valid: a finite number >= 0.")
    if not isinstance(schedule, str) and not _takes(schedule, 2):
        raise ValueError(
            f"{where}: schedule, got {schedule!r}; valid: {', '.join(SCHEDULES)}, or a function of (count, num_steps) "
            "returning a factor of lr, e.g. lambda count, num_steps: optax_schedule(count)."
        )
    if labels is not None and not _takes(labels, 2):
        raise ValueError(f"{where}: labels, got {labels!r}; valid: a function of (path, leaf).")
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise unknown(where, "schedule", schedule, SCHEDULES)
        if schedule == "cosine" and num_steps is None:
            raise ValueError(f"{where}: schedule='cosine' needs num_steps=<total updates>.")
    if nonfinite not in NONFINITE:
        raise unknown(where, "nonfinite", nonfinite, NONFINITE)


def _at_least_0(x: Any) -> bool:
    try:
        return not isinstance(x, str) and 0 <= float(x) < float("inf")
    except (TypeError, ValueError):
        return False


def _takes(f: Any, n: int) -> bool:
    """Whether f is a function that can be called with n arguments."""
    try:
        inspect.signature(f).bind(*range(n))
    except TypeError:
        return False
    except ValueError:  # a built-in one does not say
        return callable(f)
    return True


def _loss(where: str, needs: frozenset[str], params, value) -> jax.Array | None:
    """() float32, or None; refuses an update that was not given what it needs."""
    if params is None:
        raise ValueError(f"{where}: update got params=None; call tx.update(grads, state, params).")
    if "value" not in needs:
        return None
    if value is None:
        raise ValueError(f"{where}: this rule needs the loss; call tx.update(grads, state, params, value=loss).")
    if jnp.shape(value) != ():
        raise ValueError(f"{where}: value, got shape {jnp.shape(value)}; valid: the loss, a scalar.")
    return jnp.asarray(value, jnp.float32)


def _without_nonfinite(ok: list[jax.Array], g: list[jax.Array], told: Told):
    """Zeros where a tensor is to be skipped; a loss that is not finite would stay in a rule's averages: skip all."""
    if told.value is not None:
        known = jnp.isfinite(told.value)
        ok, told = [k & known for k in ok], told._replace(value=jnp.where(known, told.value, 0.0))
    return ok, [jnp.where(k, x, 0.0) for k, x in zip(ok, g, strict=True)], told


def _select(keep: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(keep, n, o), new, old)


def _rms_by_group(leaves: list[Leaf], steps: list[jax.Array]) -> dict[str, jax.Array]:
    """Root mean square of the steps of each group of leaves."""
    sums: dict[str, list[Any]] = {}
    for leaf, step in zip(leaves, steps, strict=True):
        total = sums.setdefault(leaf.group, [jnp.zeros((), jnp.float32), 0])
        total[0] = total[0] + jnp.sum(jnp.square(step.astype(jnp.float32)))
        total[1] += step.size
    return {group: jnp.sqrt(total / size) for group, (total, size) in sums.items()}


def _wide(x: Any) -> jax.Array:
    """At least float32, at least rank 1."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(x.shape or (1,))


def _finite(grads: list[jax.Array], nonfinite: Nonfinite) -> list[jax.Array] | None:
    """() bool a leaf: may it be updated? None: do not ask."""
    if nonfinite == "propagate" or not grads:
        return None
    # Of the sum of squares: one that overflows poisons means of squares in the state as much as a NaN does.
    ok = [jnp.isfinite(jnp.sum(g * g)) for g in grads]
    return ok if nonfinite == "skip_leaf" else [jnp.all(jnp.stack(ok))] * len(ok)


def _describe(where: str, path: Any, p: Any, labels: Any) -> Leaf | None:
    """What is known of a leaf; None for a frozen or empty one. Raises on a label or dtype that has no meaning."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    got = labels(name, p) if labels is not None else None
    if not isinstance(got, str | Iterable | None):
        raise ValueError(f"{where}: labels({name!r}), got {got!r}; valid: a label, several or None.")
    got = frozenset((got,) if isinstance(got, str) else got or ())
    for label in got - set(LABELS):
        raise unknown(f"{where}: labels({name!r})", "label", label, LABELS)
    if "freeze" in got:
        return None
    if jnp.result_type(p) not in FLOATS:
        raise ValueError(
            f"{where}: parameter {name!r} has dtype {jnp.result_type(p)}; valid: {', '.join(FLOATS)}. "
            "Label it 'freeze', or leave it out with optax.masked or optax.multi_transform."
        )
    return Leaf(name, jnp.shape(p) or (1,), got) if jnp.size(p) else None


def clip_global_norm(grads: list[jax.Array], max_norm: float) -> list[jax.Array]:
    """Scale all gradients so that their joint L2 norm is at most max_norm."""
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in grads))
    return [g * (max_norm / jnp.maximum(norm, max_norm)) for g in grads]
