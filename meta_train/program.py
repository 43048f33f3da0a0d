"""A run's program: its state, and the jitted meta-step of each of its stages."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import tasks
from lopt import mup, rules
from lopt.base import LearnedOptimizer, unknown
from lopt.console import compiler_options
from lopt.pretrained import CONFIG, find, named_leaves, read
from meta_train import config as cfg
from meta_train import distributed, draws, meta_optimizer, placement, separate, validation
from meta_train.checkpoint import digest
from meta_train.estimators import REGISTRY as ESTIMATORS
from meta_train.estimators.base import Estimate, Estimator
from meta_train.estimators.unroll import finite
from meta_train.groups import batch_shapes, feed, make_tasks, param_shapes
from meta_train.inner import Horizon, Inner, make_inner
from meta_train.placement import usable_devices

AXIS = "particles"


class State(NamedTuple):
    """What a meta-step changes and a checkpoint holds; also, with other leaves, the layout of the same."""

    step: Any  # () int32, meta-steps done
    theta: Any
    opt: Any  # of the meta-optimizer
    estimators: Any  # tuple, one a group, particles on the leading axis; () for a group that lives on other processes
    skipped: Any  # () int32, meta-steps whose gradient was not finite and was not applied
    ema: Any = ()  # moving average of theta, if the run has one: what is exported then
    best: Any = ()  # validation.Best, if the run has meta-validation; no meta-step sees it

    @property
    def last(self) -> Any:
        """Theta as it is now, for those who use it."""
        return self.theta if self.ema == () else self.ema

    @property
    def exported(self) -> Any:
        """Theta for those who use it: the best one where there is meta-validation."""
        return self.last if self.best == () else self.best.theta


class Stage(NamedTuple):
    """A part of the curriculum: its function `meta_step: (data, State) -> (State, metrics)`."""

    start: int  # its first meta-step
    meta_step: Any  # one jitted function, or `separate.Separate`, unless groups live on different processes
    inner_steps: int  # the most inner updates of one meta-step, all copies counted; the metrics have what it was


class Program(NamedTuple):
    """A run, compiled lazily.

    Fields:
      rule: that is meta-trained.
      data: pytree of the groups' data, on every device that holds them.
      init: `() -> State`.
      stages: each with its `meta_step: (data, State) -> (State, metrics)`; State is donated and of the same shapes in
        all; metrics are scalars by name.
      place: puts a whole State of host arrays on the devices.
      gather: a whole State as numpy in the first process, of use to no other; all processes must ask.
      shapes: of a whole State.
      layout: in words, the devices and processes that a State lies on.
      feed: `meta-step -> data`, of which a window at a time may be on the devices.
      batches: shapes of the groups' batches, which a config need not say.
      digest: of the groups' data, in words.
      validate: `State -> (State, scores by name)`, or None without meta-validation.
    """

    rule: LearnedOptimizer
    data: tuple[Any, ...]
    init: Callable[[], State]
    stages: tuple[Stage, ...]
    place: Callable[[State], State]
    gather: Callable[[State], State]
    shapes: State
    layout: str
    feed: Callable[[int], tuple[Any, ...]]
    batches: Any = None
    digest: str = ""
    validate: Callable[[State], tuple[State, dict[str, jax.Array]]] | None = None

    def at(self, step: int) -> Stage:
        """The stage of a meta-step, counted from 0."""
        return max((stage for stage in self.stages if stage.start <= step), key=lambda stage: stage.start)

    @property
    def meta_step(self):
        """Of the first stage."""
        return self.stages[0].meta_step


def make_estimator(
    spec: cfg.Estimator, inner: Inner, template: Any, truncation: int, freeze: Sequence[str] = ()
) -> Estimator:
    """The estimator of a config, given those of the settings that it takes.

    What is frozen is not perturbed: its noise would be noise in the gradient of the rest.

    Raises:
      ValueError: for an unknown estimator, a setting it does not have, or a value out of range.
    """
    if spec.name not in ESTIMATORS:
        raise unknown("config.estimator.name", "estimator", spec.name, ESTIMATORS)
    factory = getattr(importlib.import_module(ESTIMATORS[spec.name]), spec.name)
    takes = inspect.signature(factory).parameters
    for name, setting, got in (("sign", "sign", spec.sign), ("std_parts", "std", spec.std_parts)):
        if got and setting not in takes:
            raise ValueError(
                f"config.estimator.{name}, got {got}; valid: none, since {spec.name} does not perturb theta."
            )
    std = spec.std
    if spec.std_parts or freeze:
        std = meta_optimizer.by_part("config.estimator.std_parts", template, spec.std_parts, spec.std)
        std = _without(freeze, template, std)
    settings = dict(pairs=spec.pairs, particles=spec.pairs, std=std, truncation=truncation, sign=spec.sign)
    return factory(inner, **{name: value for name, value in settings.items() if name in takes})


def _without(freeze: Sequence[str], template: Any, tree: Any) -> Any:
    """A tree like theta with 0 for the parts that are frozen."""
    if not freeze:
        return tree
    trained = meta_optimizer.by_part("config.freeze", template, dict.fromkeys(freeze, False), True)
    return jax.tree.map(lambda keep, x: x if keep else 0 * x, trained, tree)


def _start(run: cfg.Run, rule: LearnedOptimizer, start: Path | None) -> Any | None:
    """Theta of `init_from`, or None.

    Raises ValueError if it is another rule's or of another shape, or if it has met what is held out.
    """
    if not run.init_from:
        return None
    source = start or run.init_from
    try:
        other, theta = read(source)
    except ValueError as e:
        raise ValueError(f"config.init_from: {e}") from e
    came = json.loads((find(source) / CONFIG).read_text()).get("provenance", {})
    if came.get("run", {}).get("allow_held_out") and not run.allow_held_out:
        raise ValueError(
            f"config.init_from: {run.init_from} was meta-trained with --allow-held-out; valid: another start, or "
            "--allow-held-out here too, after which no score on the held-out suite means anything."
        )
    ours, theirs = (
        {name: x.shape for name, x in named_leaves(t).items()}
        for t in (jax.eval_shape(rule.init_theta, jax.random.key(0)), theta)
    )
    if other.name != rule.name or ours != theirs:
        raise ValueError(
            f"config.init_from: {run.init_from} is {other.name} {dict(other.settings)}; "
            f"valid: an artifact of {rule.name} with theta of the same shapes as {dict(rule.settings)}."
        )
    return theta


def build(run: cfg.Run, start: Path | None = None) -> Program:
    """Resolve names and assemble the meta-step.

    Args:
      run: what to build.
      start: where the artifact of `run.init_from` is now, if not there.

    Raises:
      ValueError: for an unknown rule, task, estimator or setting, a value out of range, pairs that do not divide over
        the devices, groups on processes that there are not, or meta-validation on a task of the mixture.
    """
    if run.validation.suite:
        got = f"config.validation.suite, got {run.validation.suite!r} when its program is built"
        raise ValueError(f"{got}; valid: none: lopt-train puts the suite's tasks into validation.tasks.")
    rule = rules.make(run.rule, **run.rule_settings)
    group_tasks = make_tasks(run, run.groups)
    if run.normalise == "init":
        _refuse_losses_at_init("groups", run, rule, run.groups, group_tasks)
    mesh, placed = _devices_of(run)
    start_theta = _start(run, rule, start)
    template = jax.eval_shape(rule.init_theta, jax.random.key(0))
    tx = meta_optimizer.make(run.meta_optimizer, run.meta_steps, template, run.freeze)
    weights = _shares(run.groups)
    seed = partial(jax.random.fold_in, draws.key(run.seed))

    def estimator(stage: cfg.Stage, group: int, data: Any) -> Estimator:
        inner = _inner(
            run, rule, group_tasks[group]._replace(data=data), run.groups[group], Horizon(stage.low, stage.high)
        )
        return make_estimator(run.estimator, inner, template, stage.truncation, run.freeze)

    def initial(groups: Iterable[int]) -> State:
        """With the particles of some groups."""
        return whole({i: group_tasks[i].data for i in groups}, start_theta)

    # One program: a hundred small ones take a second to compile, and none is worth an entry in the compilation cache.
    @jax.jit
    def whole(data: dict[int, Any], start_theta: Any) -> State:
        """At the first meta-step, with the particles of groups whose data is given."""
        theta_key, *group_keys = jax.random.split(seed(0), 1 + len(group_tasks))
        theta = rule.init_theta(theta_key) if start_theta is None else start_theta
        first, zero = run.schedule()[0], jnp.zeros((), jnp.int32)
        states = {i: estimator(first, i, held).init(group_keys[i], theta) for i, held in data.items()}
        ema = theta if run.meta_optimizer.ema else ()
        best = validation.nothing_yet(theta) if run.validation.tasks else ()
        every = tuple(states.get(i, ()) for i in range(len(group_tasks)))
        return State(zero, theta, tx.init(theta), every, zero, ema, best)

    def estimate(stage, i, number, data, step, theta, state) -> tuple[Estimate, Any]:
        """Of group i, with its data and its particles; `number` is i, traced where other groups share the program."""
        key = jax.random.fold_in(jax.random.fold_in(seed(1), step), number)
        found, state = estimator(stage, i, data).estimate(key, theta, state)
        return found._replace(grad=_without(run.freeze, template, found.grad)), state

    def update(state: State, grad: Any, loss: Any, norms: Any, counts: Any) -> tuple[State, dict[str, jax.Array]]:
        """Move theta by the weighted gradient; losses and norms are [G], counts [4, G]."""
        # A group that lost every particle's gradient has none, and a mean of zeros that must not pass for one.
        norms = [jnp.where(lost < run.estimator.pairs, x, jnp.nan) for x, lost in zip(norms, counts[3], strict=True)]
        norm = optax.tree.norm(grad)
        mean = sum(w * x for w, x in zip(weights, loss, strict=True))
        updates, opt = tx.update(grad, state.opt, state.theta, value=mean)
        theta = optax.apply_updates(state.theta, updates)
        usable = jnp.isfinite(norm) & jnp.isfinite(jnp.stack(norms)).all() & finite(theta)
        theta, opt, ema = jax.tree.map(
            lambda new, old: jnp.where(usable, new, old),
            (theta, opt, meta_optimizer.average(state.ema, theta, opt, run.meta_optimizer)),
            (state.theta, state.opt, state.ema),
        )
        skipped = state.skipped + (1 - usable.astype(jnp.int32))
        metrics: dict[str, Any] = {
            "meta_loss": mean,
            "grad_norm": norm,
            **dict(zip(("diverged", "resets", "inner_steps"), (sum(count) for count in counts[:3]), strict=True)),
            "skipped": skipped,
        }
        for i in range(len(weights)):
            metrics |= {f"meta_loss/{i}": loss[i], f"grad_norm/{i}": norms[i], f"diverged/{i}": counts[0][i]}
            metrics[f"skipped/{i}"] = 1 - jnp.isfinite(norms[i]).astype(jnp.int32)
        return state._replace(step=state.step + 1, theta=theta, opt=opt, skipped=skipped, ema=ema), metrics

    def most(stage: cfg.Stage) -> int:
        return sum(estimator(stage, i, task.data).inner_steps for i, task in enumerate(group_tasks))

    shapes = jax.eval_shape(lambda: initial(range(len(group_tasks))))
    data = [jax.device_get(task.data) for task in group_tasks]
    fed = partial(feed, group_tasks, every=run.window_steps)
    pieces = Pieces(rule, data, fed, run.schedule(), weights, shapes, initial, estimate, update, most)
    program = _together(pieces, mesh) if placed is None else _apart(pieces, mesh, placed)
    batches = {f"groups.{i} batch": batch_shapes(t) for i, t in enumerate(group_tasks)}
    program = program._replace(batches=batches, digest=f"data {digest(data)[:8]}")
    if not run.validation.tasks:
        return program
    return program._replace(validate=_validator(run, rule, group_tasks, mesh, seed(2)))


class Pieces(NamedTuple):
    """What a meta-step is made of, wherever the groups live; G groups."""

    rule: LearnedOptimizer
    data: Sequence[Any]  # of the groups, on the host
    feed: Callable[..., Callable[[int], tuple[Any, ...]]]  # of data on the devices and of what puts them there
    schedule: tuple[cfg.Stage, ...]
    weights: Sequence[float]  # of the groups, summing to 1
    shapes: State
    initial: Callable[[Iterable[int]], State]  # with the particles of these groups
    estimate: Callable[..., tuple[Estimate, Any]]  # (stage, group, its number, data, step, theta, its state)
    update: Callable[..., tuple[State, dict[str, jax.Array]]]
    most: Callable[[cfg.Stage], int]  # inner updates of a meta-step

    def move(self, state: State, each: Sequence[Estimate]) -> tuple[State, dict[str, jax.Array]]:
        """Theta moved by the weighted estimates of all groups."""
        scaled = [jax.tree.map(lambda g, w=w: w * g, e.grad) for w, e in zip(self.weights, each, strict=True)]
        grad = jax.tree.map(lambda *gs: sum(gs), *scaled)
        counts = [[getattr(e, name) for e in each] for name in ("diverged", "resets", "steps", "lost")]
        return self.update(state, grad, [e.loss for e in each], [e.norm for e in each], counts)


EVERYWHERE, SPREAD = PartitionSpec(), PartitionSpec(AXIS)


def _together(pieces: Pieces, mesh: Mesh) -> Program:
    """All processes hold all groups: over one mesh, one program, or one a group."""
    layout = State(EVERYWHERE, EVERYWHERE, EVERYWHERE, SPREAD, EVERYWHERE, EVERYWHERE, EVERYWHERE)
    options = compiler_options(devices=len(mesh.local_devices))
    shardings, replicated = State(*(NamedSharding(mesh, part) for part in layout)), NamedSharding(mesh, EVERYWHERE)

    def compiled(stage: cfg.Stage) -> Stage:
        step = one_program(stage) if len(pieces.weights) == 1 else one_each(stage)
        return Stage(stage.start, step, pieces.most(stage))

    def one_program(stage: cfg.Stage) -> Any:
        def estimate(data, step, theta, state):
            found, state = pieces.estimate(stage, 0, 0, data, step, theta, state)
            return found.across(AXIS), state

        def meta_step(data, state: State):
            parts = dict(in_specs=(EVERYWHERE, EVERYWHERE, EVERYWHERE, SPREAD), out_specs=(EVERYWHERE, SPREAD))
            found, after = jax.shard_map(estimate, mesh=mesh, check_vma=False, **parts)(
                data[0], state.step, state.theta, state.estimators[0]
            )
            return pieces.move(state._replace(estimators=(after,)), [found])

        # Said and not left to XLA, which replicates empty leaves: the next call would be compiled again.
        step = jax.jit(
            meta_step,
            donate_argnums=1,
            out_shardings=(shardings, replicated),
            compiler_options=options,
        )
        # Errors of settings surface before anything is written. As it lies later, so that it is traced only once.
        jax.eval_shape(step, data, lying)
        return step

    def one_each(stage: cfg.Stage) -> separate.Separate:
        spread, rest = NamedSharding(mesh, SPREAD), shardings._replace(estimators=())

        def part(i: int) -> Any:
            def estimate(number, data, step, theta, state, turn):
                found, state = pieces.estimate(stage, i, number, data, step, theta, state)
                return separate.lead(found), state

            specs = (EVERYWHERE, EVERYWHERE, EVERYWHERE, EVERYWHERE, SPREAD, SPREAD)
            return jax.jit(
                jax.shard_map(estimate, mesh=mesh, in_specs=specs, out_specs=(SPREAD, SPREAD), check_vma=False),
                donate_argnums=4,
                keep_unused=True,  # the turn
                in_shardings=tuple(NamedSharding(mesh, spec) for spec in specs),
                out_shardings=(spread, spread),
                compiler_options=options,
            )

        def move(found, state: State):
            return pieces.move(state, [separate.across(one) for one in found])

        meet = jax.jit(
            move,
            donate_argnums=1,
            in_shardings=(spread, rest),
            out_shardings=(rest, replicated),
            compiler_options=options,
        )
        turn = jax.jit(lambda: jnp.zeros(mesh.size), out_shardings=spread)()
        step = separate.Separate([part(i) for i in range(len(pieces.weights))], meet, turn)
        step.trace(data, lying)  # errors of settings surface before anything is written
        return step

    def init() -> State:
        return place(jax.device_get(pieces.initial(range(len(pieces.weights)))))

    # By way of the host: an array of one process cannot be spread over the devices of all.
    def put(held: Sequence[Any]) -> tuple[Any, ...]:
        return jax.device_put(jax.device_get(tuple(held)), replicated)

    data, place = put(pieces.data), _copy_to(shardings)
    lying = jax.eval_shape(place, pieces.shapes)
    stages, fed = tuple(compiled(stage) for stage in pieces.schedule), pieces.feed(data=data, put=put)
    return Program(pieces.rule, data, init, stages, place, distributed.gather, pieces.shapes, _words(mesh), fed)


def _apart(pieces: Pieces, mesh: Mesh, placed: placement.Placement) -> Program:
    """Each process runs the program of its groups on its own devices, and one of all adds up their gradients."""
    devices = jax.local_devices()
    own = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    replicated = NamedSharding(mesh, EVERYWHERE)

    def share(stage, data, step, theta, states):
        found, after = {}, list(states)
        for i in placed.here:
            estimate, after[i] = pieces.estimate(stage, i, i, data[i], step, theta, states[i])
            found[i] = estimate.across(AXIS)
        lead = jax.lax.axis_index(AXIS) == 0
        return placement.bring(found, theta, pieces.weights, placed, lead), tuple(after)

    @partial(jax.jit, out_shardings=replicated)
    def meet(shares, state):
        return pieces.update(state, *placement.meet(shares, pieces.weights, placed, optax.tree.norm))

    def compiled(stage: cfg.Stage) -> Stage:
        here = jax.shard_map(
            partial(share, stage),
            mesh=own,
            in_specs=(EVERYWHERE, EVERYWHERE, EVERYWHERE, SPREAD),
            out_specs=(SPREAD, SPREAD),
            check_vma=False,
        )
        here = jax.jit(
            here,
            donate_argnums=3,
            out_shardings=NamedSharding(own, SPREAD),
            compiler_options=compiler_options(devices=own.size),
        )
        held = jax.eval_shape(placed.cut, pieces.shapes.estimators)
        jax.eval_shape(here, data, pieces.shapes.step, pieces.shapes.theta, held)  # errors of settings surface here

        def meta_step(data, state: State):
            step, theta = placement.of_this((state.step, state.theta), own)
            shares, states = here(data, step, theta, state.estimators)
            rest, metrics = meet(placement.of_all(shares, mesh, AXIS), state._replace(estimators=()))
            return rest._replace(estimators=states), metrics

        return Stage(stage.start, meta_step, pieces.most(stage))

    def place(state: State) -> State:
        mine = particles(placed.cut(state.estimators))
        return rest(state._replace(estimators=()))._replace(estimators=mine)

    def gather(state: State) -> State:
        whole = distributed.gather(state._replace(estimators=()))
        return whole._replace(estimators=placement.gather(state.estimators, pieces.shapes.estimators, placed))

    def init() -> State:
        return place(jax.device_get(pieces.initial(placed.here)))

    rest, particles = _copy_to(replicated), _copy_to(NamedSharding(own, SPREAD))

    def put(held: Sequence[Any]) -> tuple[Any, ...]:
        return jax.device_put(placed.only(jax.device_get(tuple(held))), NamedSharding(own, EVERYWHERE))

    data = put(pieces.data)
    stages = tuple(compiled(stage) for stage in pieces.schedule)
    fed = pieces.feed(data=data, put=put)
    return Program(pieces.rule, data, init, stages, place, gather, pieces.shapes, _words(mesh, placed), fed)


def _devices_of(run: cfg.Run) -> tuple[Mesh, placement.Placement | None]:
    """A mesh of all devices of all processes, or in one process of as many as the pairs divide over; who holds what."""
    available, pairs = jax.device_count(), run.estimator.pairs
    devices = jax.devices()[: usable_devices(pairs, available)]
    some = any(group.processes for group in run.groups)
    each = placement.equal_devices() if some else 0
    placed = placement.place(run.groups, pairs, jax.process_count(), jax.process_index(), each)
    if placed:
        devices = jax.devices()
    elif distributed.several() and len(devices) < available:
        raise ValueError(
            f"config.estimator.pairs, got {pairs}; valid: a multiple of the {available} devices of all processes."
        )
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices), placed


def _copy_to(shardings: Any) -> Callable[[Any], Any]:
    """Copies, so that no donated buffer is shared with another one or with the host: device_put may alias both."""
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)


def _words(mesh: Mesh, placed: placement.Placement | None = None) -> str:
    """What a state lies on. One that goes on elsewhere is no longer the same bit for bit."""
    several = f" of {jax.process_count()} processes" if distributed.several() else ""
    groups = f", groups on processes {' | '.join(' '.join(map(str, h)) for h in placed.holders)}" if placed else ""
    return f"{mesh.size} devices{several}{groups}"


def _inner(run: cfg.Run, rule: LearnedOptimizer, task: tasks.Task, group: cfg.Group, horizon: Horizon) -> Inner:
    return make_inner(
        rule,
        task,
        horizon=horizon,
        meta_loss=run.meta_loss,
        loss_limit=run.loss_limit,
        objective=run.objective,
        last_steps=run.last_steps,
        normalise=run.normalise,
        reference_loss=group.reference_loss,
        stagger=run.horizon.stagger,
        multipliers=_multipliers(group, task),
        judge_average=run.judge_average,
    )


def _multipliers(group: cfg.Group, task: tasks.Task) -> Any:
    """Of a group whose settings have a `mup_base`, as a user of `lopt.mup` would give them; None of any other."""
    base = tasks.mup_base(group.family, group.settings)
    if base is None:
        return None
    key = jax.random.key(0)
    return mup.multipliers(*(jax.eval_shape(lambda t=t: t.init(key, t.sample(key))) for t in (base, task)))


def _refuse_losses_at_init(
    where: str, run: cfg.Run, rule: LearnedOptimizer, groups: Sequence[cfg.Group], group_tasks: Sequence[tasks.Task]
) -> None:
    """Raise ValueError for a group in which losses at init are no measure, since some of sixteen are not positive."""
    for i, (group, task) in enumerate(zip(groups, group_tasks, strict=True)):

        @jax.jit
        def scales(keys, data, group=group, task=task):
            inner = _inner(run, rule, task._replace(data=data), group, Horizon(run.horizon.low, run.horizon.high))
            return jax.vmap(lambda key: inner.reset(key).scale)(keys)

        bad = int(jnp.sum(~(scales(jax.random.split(jax.random.key(run.seed), 16), task.data) > 0)))
        if bad:
            raise ValueError(
                f"config.normalise, got 'init', but {bad} of 16 losses at init of {where}.{i}, {group.family}, are not "
                "positive; valid: none, or reference (with a reference_loss > 0 of each group)."
            )


def _shares(groups: Sequence[cfg.Group]) -> list[float]:
    return [group.weight / sum(g.weight for g in groups) for group in groups]


def _validator(
    run: cfg.Run, rule: LearnedOptimizer, mixture: Sequence[tasks.Task], mesh: Mesh, key: jax.Array
) -> Callable[[State], tuple[State, dict[str, jax.Array]]]:
    """Meta-validation of a run. Raises ValueError for a task of the mixture, or one that cannot be built."""
    held_out = make_tasks(run, run.validation.tasks)
    for i, (group, task) in enumerate(zip(run.validation.tasks, held_out, strict=True)):
        for j, (other, trained) in enumerate(zip(run.groups, mixture, strict=True)):
            shared = {source.id for source in task.provenance} & {source.id for source in trained.provenance}
            alike = group.family == other.family and shared and param_shapes(task) == param_shapes(trained)
            # What has no data draws an instance anew each time: the same family is other tasks.
            if alike or (task.name == trained.name and task.composite is None):
                raise ValueError(
                    f"config.validation.tasks.{i}, got {task.name}, which is in the mixture: groups.{j} is "
                    f"{trained.name}; valid: another family, other shapes of params, or other data."
                )
    if run.normalise == "init":
        _refuse_losses_at_init("validation.tasks", run, rule, run.validation.tasks, held_out)
    horizon = Horizon(run.validation.inner_steps, run.validation.inner_steps)
    on_validation = dataclasses.replace(run, meta_loss="validation")

    def inner(i: int, data: Any) -> Inner:
        return _inner(on_validation, rule, held_out[i]._replace(data=data), run.validation.tasks[i], horizon)

    data = jax.device_get(tuple(task.data for task in held_out))
    judge = validation.make(
        inner,
        jax.device_put(data, NamedSharding(mesh, PartitionSpec())),
        weights=_shares(run.validation.tasks),
        seeds=run.validation.seeds,
        key=key,
        mesh=mesh,
    )

    def validate(state: State) -> tuple[State, dict[str, jax.Array]]:
        best, scores = judge(state.last, state.best, state.step)
        return state._replace(best=best), scores

    return validate
