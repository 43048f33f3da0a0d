"""From per-tensor arithmetic to an optax transform: what every rule shares and no rule repeats.

A rule is written on a tensor of rank >= 1 (`lopt.tensor`). This file turns it into a
`optax.GradientTransformationExtraArgs`: None and masked leaves pass through, scalars act as shape (1,),
low-precision parameters are computed in float32, a non-finite gradient skips its leaf, and `lr`,
`weight_decay` and `schedule` mean the same for each rule: u = -lr · schedule(t) · (direction + weight_decay · p).
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt import averaging, explicit, precision, sharded
from lopt.base import LearnedOptimizer, unknown
from lopt.tensor import Given, Group, Leaf, Moved, Step, Tensor, groups, stacks

Schedule = Callable[[jax.Array, Any], Any]
Labels = Callable[[str, Any], str | Iterable[str] | None] | None
Nonfinite = Literal["skip_leaf", "skip_tree", "propagate"]
FLOATS = ("float16", "bfloat16", "float32", "float64")
NONFINITE = ("skip_leaf", "skip_tree", "propagate")
LABELS = ("embedding", "output", "no_decay", "freeze")


class Told(NamedTuple):
    """What an update is told besides gradients and parameters."""

    count: jax.Array  # () int32, updates applied before this one
    num_steps: Any  # horizon in updates: int, () array, or None
    value: jax.Array | None  # () loss at the parameters, or None


class State(NamedTuple):
    """Optimizer state; float32 (float64 for float64 parameters) but for counters and bfloat16 `accumulators`."""

    count: jax.Array  # () int32, updates so far
    skipped: jax.Array  # () int32, leaf updates skipped because their gradient was not finite
    leaves: Any  # like params: the rule's state of each tensor, see `Plan.stacks`
    shared: Any  # the rule's state across tensors, () if it has none
    update_rms: Any  # dict of () root mean squares of the last update, by label (see `Leaf.group`)


class Plan(NamedTuple):
    """What is known of the parameters before they are traced."""

    live: list[tuple[int, Leaf]]  # index and leaf, without those where nothing is to be done (frozen or empty)
    # Which are updated together, by their indices in `live`. The first of a stack has the state of all, with an axis
    # over them in front, and the others have none.
    stacks: list[tuple[int, ...]]
    specs: list[Any]  # one a leaf of the parameters with a mesh, none without


def each_alone(together: list[Group], shared: Any, told: Told) -> tuple[Any, list[Any], Any]:
    """`Arithmetic.prepare` of a rule that looks at one tensor at a time."""
    return told, [()] * len(together), shared


class Arithmetic(NamedTuple):
    """A rule; parameters move along minus the direction.

    init_leaf: `(Leaf, p) -> state of the tensor`.
    update: `(Tensor, (theta, common), own) -> (Moved, state)` of a tensor. Nothing traced may be closed over.
    theta: what `update` is given of the meta-parameters.
    prepare: `(groups, shared, told) -> (common, own, shared)`: what comes before, across tensors; `own` of each group,
      with an axis over its tensors.
    init_shared: `leaves -> state across tensors`.
    stacked: whether equal small tensors have one state.
    clean: `gradient -> gradient`, before it is asked whether it is finite.
    decay: `(Leaf, weight_decay) -> weight decay of the tensor`, what `bind` was given unless an original has its own.
    """

    init_leaf: Callable[[Leaf, jax.Array], Any]
    update: Callable[[Tensor, Any, Any], tuple[Moved, Any]]
    theta: Any
    prepare: Callable[[list[Group], Any, Told], tuple[Any, list[Any], Any]] = each_alone
    init_shared: Callable[[list[Leaf]], Any] = lambda leaves: ()
    stacked: bool = True
    clean: Callable[[jax.Array], jax.Array] = lambda g: g
    decay: Callable[[Leaf, Any], Any] = lambda leaf, weight_decay: weight_decay


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
    average: float = 0.0,
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
      average: the rule's own default.
    """
    needed = frozenset(needs)
    default_lr, default_schedule, default_average = lr, schedule, average

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
        mesh: Any = None,
        specs: Any = None,
        accumulators: str = "float32",
        average: float | None = None,
    ) -> optax.GradientTransformationExtraArgs:
        power = default_average if average is None else average
        tx = as_optax(
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
            mesh=mesh,
            specs=specs,
            accumulators=accumulators,
            decay_after=decay_after,
        )
        return averaging.averaged(tx, power) if power else tx

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
    mesh: Any,
    specs: Any,
    accumulators: str,
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
      mesh: `jax.sharding.Mesh` of the parameters, or None. With it each device updates its part of every tensor, and no
        more than means cross the network (but for Newton–Schulz, which gathers its matrices). Without it sharded
        parameters are updated to the same result, more slowly.
      specs: tree like params of `PartitionSpec`s (None: replicated), with `mesh`.
      accumulators: "float32", or "bfloat16" for half the state of tensors of rank >= 2, rounded stochastically.
      decay_after: see `define`.

    Raises:
      ValueError: on a bad argument, naming it, its value and the valid choices.
    """
    where = f"lopt.rules.{name}"
    _check(where, needs, num_steps, lr, weight_decay, schedule, labels, nonfinite)
    if (mesh is None) != (specs is None):
        raise ValueError(f"{where}: mesh, got {mesh!r} with specs {specs!r}; valid: both or neither.")
    if accumulators not in precision.ACCUMULATORS:
        raise unknown(where, "accumulators", accumulators, precision.ACCUMULATORS)
    unit_schedule = SCHEDULES[schedule] if isinstance(schedule, str) else schedule

    def planned(params) -> Plan:
        paths = jax.tree_util.tree_leaves_with_path(params)
        flat = [] if mesh is None else sharded.flat_specs(where, mesh, specs, params)
        live, kinds = [], []
        for i, (path, p) in enumerate(paths):
            leaf = _describe(where, path, p, labels)
            if leaf is None:
                continue
            live.append((i, leaf._replace(axes=sharded.names(flat[i], len(leaf.shape))) if flat else leaf))
            kinds.append((jnp.result_type(p), explicit.spec_of(p)))
        kinds = kinds if arithmetic(theta).stacked else range(len(live))
        return Plan(live, stacks([leaf for _, leaf in live], kinds), flat)

    def init(params) -> State:
        plan = planned(params)
        begin = functools.partial(start, plan)
        if mesh is None:
            return _explicit(begin, params, None, theta, params)
        state = begin(theta, params)
        return sharded.place(mesh, state_specs(plan, params, state), state)

    def state_specs(plan, params, state) -> State:
        return sharded.replicated(state)._replace(leaves=sharded.specs_like(plan.specs, params, state.leaves))

    def stored(state, p):
        """The state of a tensor in the precision it is kept in."""

        def one(x: jax.Array) -> jax.Array:
            large = x.shape[x.ndim - jnp.ndim(p) :] == jnp.shape(p) and x.dtype == jnp.float32
            return x.astype(accumulators) if large else x

        return jax.tree.map(one, state) if jnp.ndim(p) > 1 else state

    def start(plan: Plan, theta, params) -> State:
        rule = arithmetic(theta)
        leaves, treedef = jax.tree.flatten(params)
        states: list[Any] = [None] * len(leaves)
        for indices in plan.stacks:
            members = [plan.live[j] for j in indices]
            each = [
                stored(rule.init_leaf(leaf, precision.wide(jnp.atleast_1d(leaves[i]))), leaves[i])
                for i, leaf in members
            ]
            first = members[0][0]
            states[first] = each[0] if len(each) == 1 else jax.tree.map(lambda *xs: jnp.stack(xs), *each)
        live = [a for _, a in plan.live]
        rms = {a.group: jnp.zeros((), jnp.float32) for a in live} if diagnostics else None
        zero = jnp.zeros((), jnp.int32)
        return _apart(State(zero, zero, treedef.unflatten(states), rule.init_shared(live), rms))

    def step_of(leaf: Leaf, rate: Any, count: jax.Array, rule: Arithmetic, weight_decay: Any) -> Step:
        decay = 0 if "no_decay" in leaf.labels else rule.decay(leaf, weight_decay)
        if isinstance(decay, numbers.Number) and decay == 0:
            decay = None
        return Step(rate, count, decay_moved=decay) if decay_after else Step(rate, count, decay)

    def update(updates, state, params=None, *, value=None, **extra_args):
        del extra_args  # optax's convention: a transform ignores what it does not need
        told = Told(state.count, num_steps, _loss(where, needs, params, value))
        factors = _factors(where, params, multipliers)
        plan = planned(params)
        apply = functools.partial(step, plan)
        if mesh is None:
            return _explicit(apply, params, state, theta, (lr, weight_decay, factors), told, updates, state, params)
        own = jax.tree.structure(params).unflatten(plan.specs), state_specs(plan, params, state)
        like = sharded.specs_like(plan.specs, params, updates), own[1], own[0]
        bound, arrays = _arrays_apart((theta, (lr, weight_decay, factors), told))

        def run(arrays, updates, state, params):
            theta, hyper, told = bound(arrays)
            return apply(theta, hyper, told, updates, state, params)

        in_specs = (sharded.replicated(arrays), *like)
        mapped = jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=own, check_vma=False)
        return mapped(arrays, updates, state, params)

    def step(plan, theta, hyper, told, updates, state, params):
        (lr, weight_decay, factors), rule = hyper, arithmetic(theta)
        p_leaves, treedef = jax.tree.flatten(params)
        g_leaves, states = treedef.flatten_up_to(updates), treedef.flatten_up_to(state.leaves)
        rate = lr * unit_schedule(state.count, told.num_steps)

        _check_stacks(where, plan, states)
        given = [Given(g_leaves[i], p_leaves[i], states[i], factors[i]) for i, _ in plan.live]
        leaves = [leaf for _, leaf in plan.live]
        own_step = functools.partial(step_of, rate=rate, count=state.count, rule=rule, weight_decay=weight_decay)
        together = groups(leaves, given, plan.stacks, own_step, rule.clean)
        ok = _finite(together, nonfinite)
        if ok is not None:
            ok, told = _with_loss(ok, told)
            together = [group.where(k) for group, k in zip(together, ok, strict=True)]
        results, shared = [], state.shared
        if together:
            common, own, shared = rule.prepare(together, state.shared, told)
            results = [
                group.update(rule.update, (rule.theta, common), x) for group, x in zip(together, own, strict=True)
            ]
        count, skipped = state.count + 1, state.skipped
        shared = jax.tree.map(lambda n, o: n.astype(o.dtype), shared, state.shared)
        if ok:
            # A step that every tensor skips did not happen: neither clock nor shared state moves on.
            every = jnp.concatenate(ok)
            happened = jnp.any(every)
            shared = jax.tree.map(lambda n, o: jnp.where(happened, n, o), shared, state.shared)
            count = state.count + happened.astype(jnp.int32)
            skipped = skipped + jnp.sum(~every, dtype=jnp.int32)
        places = [i for i, _ in plan.live]
        live = set(places)
        out = [None if i in live else _nothing(p) for i, p in enumerate(p_leaves)]
        for group, (moved, new, _) in zip(together, results, strict=True):
            states[places[group.indices[0]]] = new
            for j, u in zip(group.indices, moved, strict=True):
                out[places[j]] = u.reshape(jnp.shape(p_leaves[places[j]]))
        rms = _rms_by_group(together, [squares for *_, squares in results]) if diagnostics else None
        return treedef.unflatten(out), State(count, skipped, treedef.unflatten(states), shared, rms)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_stacks(where: str, plan: Plan, states: list[Any]) -> None:
    """Refuse a state that was made for other stacks."""
    for indices in plan.stacks:
        (first, leaf), *others = [plan.live[j] for j in indices]
        lengths = {x.shape[0] for x in jax.tree.leaves(states[first]) if others}
        if states[first] is None or any(states[i] is not None for i, _ in others) or lengths - {len(indices)}:
            raise ValueError(
                f"{where}: state of {leaf.path!r}, not one of {len(indices)} equal tensors; valid: the state of "
                "tx.init with these parameters, labels, mesh and specs."
            )


def _apart(state: State) -> State:
    """No array twice: a state that is donated may not share buffers with itself."""
    seen: set[int] = set()
    return jax.tree.map(lambda x: jnp.copy(x) if id(x) in seen or seen.add(id(x)) else x, state)


def _explicit(f: Callable[..., Any], params: Any, state: State | None, *args: Any) -> Any:
    """f of args, with automatic axes where the parameters' mesh has explicit ones (see `lopt.explicit`)."""
    mesh = explicit.mesh_of(params)
    if mesh is None:
        return f(*args)
    rebuilt, arrays = _arrays_apart(args)

    def with_arrays(given: dict[int, Any]) -> Any:
        return f(*rebuilt(given))

    like = state
    if like is None:
        like = jax.eval_shape(with_arrays, explicit.without_sharding(arrays))
    out = explicit.replicated(mesh, like)._replace(leaves=explicit.shardings(mesh, params, like.leaves))
    out = out if state is None else (explicit.shardings(mesh, params, params), out)

    def anchored(given: dict[int, Any]) -> Any:
        # A new state does not depend on the parameters' values; without them jit would not know the devices.
        return jax.lax.optimization_barrier((with_arrays(given), given))[0]

    return jax.sharding.auto_axes(anchored, out_sharding=out)(arrays)


def _arrays_apart(tree: Any) -> tuple[Callable[[dict[int, Any]], Any], dict[int, Any]]:
    """What gives the tree back for its arrays, and these.

    Python's numbers stay what they are; arrays must be arguments, for what a function closes over keeps explicit axes.
    """
    leaves, treedef = jax.tree.flatten(tree)
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}
    return lambda given: treedef.unflatten([given.get(i, x) for i, x in enumerate(leaves)]), arrays


def _factors(where: str, params: Any, multipliers: Any) -> list[Any]:
    """One a leaf of the parameters, by path: inside `optax.masked` these are fewer than the multipliers."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if multipliers is None:
        return [None] * len(paths)
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


def _with_loss(ok: list[jax.Array], told: Told) -> tuple[list[jax.Array], Told]:
    """A loss that is not finite would stay in a rule's averages: it skips all."""
    if told.value is None:
        return ok, told
    known = jnp.isfinite(told.value)
    return [k & known for k in ok], told._replace(value=jnp.where(known, told.value, 0.0))


def _rms_by_group(together: list[Group], mean_squares: list[jax.Array]) -> dict[str, jax.Array]:
    """Root mean square of the updates of each group of labels."""
    sums: dict[str, list[Any]] = {}
    for group, squares in zip(together, mean_squares, strict=True):
        size = math.prod(group.leaf.shape)
        total = sums.setdefault(group.leaf.group, [jnp.zeros((), jnp.float32), 0])
        total[0] = total[0] + jnp.sum(squares) * size
        total[1] += size * group.size
    return {group: jnp.sqrt(total / size) for group, (total, size) in sums.items()}


def _finite(together: list[Group], nonfinite: Nonfinite) -> list[jax.Array] | None:
    """[tensors] bool a group: may they be updated? None: do not ask."""
    if nonfinite == "propagate":
        return None
    # Of the sum of squares: one that overflows poisons means of squares in the state as much as a NaN does.
    squares = [group.each(sum_of_squares) for group in together]
    ok = [jnp.isfinite(x) for x in squares]
    if nonfinite == "skip_leaf" or not ok:
        return ok
    all_ok = jnp.all(jnp.concatenate(ok))
    return [jnp.broadcast_to(all_ok, (group.size,)) for group in together]


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


def sum_of_squares(tensor: Tensor) -> jax.Array:
    """() of the gradient."""
    return tensor.means(lambda g, *_: jnp.mean(g * g)) * math.prod(tensor.leaf.shape)


def clip_scale(together: list[Group], max_norm: float | None) -> jax.Array | float:
    """() the factor that makes the joint L2 norm of the gradients at most max_norm (None: whatever it is)."""
    if max_norm is None:
        return 1.0
    total = sum(jnp.sum(group.each(sum_of_squares)) for group in together)
    return max_norm / jnp.maximum(jnp.sqrt(total), max_norm)
