"""When nowcasts happen, how far they look, and the guard: an optax transform around any base optimizer and predictor.

Source: Knyazev et al. (2025), arXiv:2409.04434, algorithm 1 and section 4.4; the call numbers are the released code's.

Differs from the paper: the guard, and that history and counters are in the state, so that a resumed run goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt.nowcast.modules import floating

# (history [T, *shape] a leaf, horizons [K]) -> [K, *shape] float32 differences a leaf, None: the leaf stays
Predictor = Callable[[list[jax.Array], jax.Array], list[Any]]


class Settings(NamedTuple):
    """What all nowcasters are told, see `lopt.nowcast.nino`."""

    period: int
    context: int
    lr: Any
    loss_fn: Callable[..., Any] | None
    margin: float
    slack: float
    probe: int
    guard: bool
    cap: float
    reset_moments: bool


class Counts(NamedTuple):
    """What the guard decided so far; () int32 each."""

    applied: jax.Array  # nowcasts that were applied, at any horizon
    shortened: jax.Array  # of these, at a shorter horizon than the schedule's
    rejected: jax.Array  # nowcasts none of whose horizons lowered the loss, or none of which was finite
    restored: jax.Array  # nowcasts taken back after the probe
    capped: jax.Array  # tensors of applied nowcasts whose displacement was cut


class State(NamedTuple):
    """State of a nowcaster; arrays only."""

    base: Any  # the base optimizer's
    history: (
        Any  # like params: [context, *shape] captured states, in the parameters' dtype; None for leaves not of floats
    )
    count: jax.Array  # () int32, calls so far
    filled: jax.Array  # () int32, states captured in this window
    probing: jax.Array  # () int32, base steps until a nowcast is judged; -1: none is
    values: jax.Array  # [probe] float32, the last losses that updates were given
    before: jax.Array  # [2] float32, mean and variance of `values` before the nowcast that is probed
    counts: Counts


class Proposals(NamedTuple):
    """What the next call of a nowcaster could set, at horizons k, k/2 and k/4."""

    params: list[Any]  # three times the parameters
    horizons: jax.Array  # [3] int32, in capture intervals
    capped: jax.Array  # [3] int32, tensors of each whose displacement was cut


class Nowcaster(optax.GradientTransformationExtraArgs):
    """An optax transform whose nowcasts can also be made from outside of jit.

    due(state): () bool, whether the next call is a nowcast.
    propose(state, params): `Proposals`.
    accept(state, params, proposals, losses): (params, state) after the best of them in place of `update`, by losses of
      [params, *proposals.params]; where none is lower the parameters stay, and the call has made no step.
    """

    due: Callable[[State], jax.Array]
    propose: Callable[[State, Any], Proposals]
    accept: Callable[[State, Any, Proposals, Any], tuple[Any, State]]


def schedule(max_steps: int, period: int, *, farthest: int = 40, power: float = 2.0) -> np.ndarray:
    """[n] horizons k of the n = max(1, max_steps // period) nowcasts, in capture intervals.

    >>> from lopt import nowcast
    >>> nowcast.schedule(3000, 1000).tolist()
    [40, 13, 1]
    """
    for name, got in {"max_steps": max_steps, "period": period, "farthest": farthest}.items():
        if not isinstance(got, int | np.integer) or got < 1:
            raise ValueError(f"lopt.nowcast: {name}, got {got!r}; valid: an integer >= 1.")
    if not 0 < power < np.inf:
        raise ValueError(f"lopt.nowcast: power, got {power!r}; valid: > 0, finite.")
    n = max(1, max_steps // period)
    return np.round(np.linspace(farthest ** (1 / power), 1, n) ** power).astype(np.int32)


def nowcaster(
    where: str,
    base_tx: optax.GradientTransformation,
    predictor: Callable[[Any], Predictor],
    *,
    max_steps: int,
    power: float,
    farthest: int,
    reference_lr: float | None,
    settings: Settings,
) -> Nowcaster:
    """The transform of a predictor.

    Args:
      where: name of the function that was called, for messages.
      base_tx: the base optimizer.
      predictor: `params -> Predictor`, called once for each structure of parameters.
      max_steps, power: of the horizons of the nowcasts, see `schedule`.
      farthest: longest horizon that the predictor knows.
      reference_lr: of its meta-training; None: not known.
      settings: the rest.
    """
    horizons = schedule(max_steps, settings.period, farthest=farthest, power=power)
    _check(where, settings, reference_lr)
    caster = _Caster(
        where,
        predictor,
        settings,
        optax.with_extra_args_support(base_tx),
        horizons,
        farthest,
        reference_lr,
        {},
    )
    tx = Nowcaster(caster.init, caster.update)
    tx.due, tx.propose, tx.accept = caster.due, caster.propose, caster.accept
    return tx


@dataclass(frozen=True, eq=False)  # its methods are given to jit, which hashes them
class _Caster:
    """A nowcaster's functions, and what they share."""

    where: str
    predictor: Callable[[Any], Predictor]
    s: Settings
    base: optax.GradientTransformationExtraArgs
    horizons: np.ndarray  # [nowcasts]
    farthest: int
    reference_lr: float | None
    made: dict[Any, Predictor]  # by structure and shapes: in jit a plan is made once a trace

    @property
    def interval(self) -> int:
        """Calls from one captured state to the next."""
        return self.s.period // self.s.context

    def predictor_of(self, params: Any) -> Predictor:
        key = (jax.tree.structure(params), tuple(floating(params)))
        if key not in self.made:
            self.made[key] = self.predictor(params)
        return self.made[key]

    def init(self, params: Any) -> State:
        self.predictor_of(params)
        history = jax.tree.map(
            lambda p: jnp.zeros((self.s.context, *jnp.shape(p)), jnp.result_type(p)) if _float(p) else None, params
        )
        zero = jnp.zeros((), jnp.int32)
        return State(
            self.base.init(params),
            history,
            zero,
            zero,
            jnp.full((), -1, jnp.int32),
            jnp.full((self.s.probe,), jnp.nan, jnp.float32),
            jnp.full((2,), jnp.nan, jnp.float32),
            Counts(*[zero] * 5),
        )

    def horizon(self, count: jax.Array) -> jax.Array:
        """() k of this call, in capture intervals."""
        k = jnp.asarray(self.horizons)[jnp.minimum(count // self.s.period, len(self.horizons) - 1)]
        if self.s.lr is None or self.reference_lr is None:
            return k
        lr = self.s.lr(count) if callable(self.s.lr) else self.s.lr
        shorter = jnp.round(k * jnp.minimum(1.0, self.reference_lr / jnp.maximum(jnp.asarray(lr, jnp.float32), 1e-30)))
        return jnp.clip(shorter.astype(jnp.int32), 1, self.farthest)

    def captured(self, state: State, params: Any) -> State:
        """With the parameters in the history, if it is their time."""
        leaves, treedef = jax.tree.flatten(params)
        history = treedef.flatten_up_to(state.history)
        now = (state.count + 1) % self.interval == 0

        def write(some: list[jax.Array]) -> list[jax.Array]:
            slot = jnp.minimum(state.filled, self.s.context - 1)
            return [
                jax.lax.dynamic_update_index_in_dim(h, jnp.asarray(p).astype(h.dtype), slot, 0)
                for h, p in zip(some, kept, strict=True)
            ]

        kept = [p for p, h in zip(leaves, history, strict=True) if h is not None]
        new = iter(jax.lax.cond(now, write, lambda some: some, [h for h in history if h is not None]))
        history = treedef.unflatten([None if h is None else next(new) for h in history])
        return state._replace(history=history, filled=state.filled + now)

    def proposals(self, state: State, params: Any, count: int) -> tuple[list[Any], jax.Array, jax.Array]:
        """[count, *shape] differences a leaf of params (None: stays), horizons [count], tensors capped [count]."""
        leaves, treedef = jax.tree.flatten(params)
        history = treedef.flatten_up_to(state.history)
        k = self.horizon(state.count)
        at = jnp.maximum(jnp.round(k / 2.0 ** jnp.arange(count)).astype(jnp.int32), 1)
        differences = self.predictor_of(params)([h for h in history if h is not None], at)
        found, capped = [], jnp.zeros(count, jnp.int32)
        of_floats = iter(differences)
        for p, h in zip(leaves, history, strict=True):
            u = None if h is None else next(of_floats)
            if u is not None and self.s.guard:
                axes = tuple(range(1, u.ndim))
                size = jnp.sqrt(jnp.sum(u**2, axes))
                most = self.s.cap * jnp.linalg.norm(jnp.asarray(p, jnp.float32))
                capped += (size > most).astype(jnp.int32)
                # A difference that is not finite stays so, and is refused as a whole.
                factor = jnp.where(size > most, most / jnp.maximum(size, 1e-30), 1.0)
                u = u * factor.reshape(-1, *[1] * (u.ndim - 1))
            found.append(u)
        return found, at, capped

    def loss_at(self, params: Any, extra: dict[str, Any]) -> jax.Array:
        assert self.s.loss_fn is not None
        loss = self.s.loss_fn(params, extra["batch"]) if extra.get("batch") is not None else self.s.loss_fn(params)
        if jnp.shape(loss) != ():
            raise ValueError(f"lopt.nowcast.{self.where}: loss_fn, got shape {jnp.shape(loss)}; valid: a scalar.")
        return jnp.asarray(loss, jnp.float32)

    def nowcast(self, state: State, params: Any, extra: dict[str, Any]) -> tuple[jax.Array, list[Any], State]:
        """Whether to move, by how much, and the state that says so."""
        many = 3 if self.s.guard and self.s.loss_fn is not None else 1
        differences, _, capped = self.proposals(state, params, many)
        ok = _finite(differences)
        if many == 1:
            choice = jnp.where(ok[0] & (jnp.isfinite(jnp.mean(state.values)) | (not self.s.guard)), 1, 0)
        else:
            losses = jax.lax.map(lambda i: self.loss_at(_at_place(params, differences, i), extra), jnp.arange(many))
            losses = jnp.concatenate([self.loss_at(params, extra)[None], jnp.where(ok, losses, jnp.inf)])
            choice = self.best(losses)
        moves = choice > 0
        place = jnp.maximum(choice - 1, 0)
        state = self.decided(state, choice, capped[place])
        treedef = jax.tree.structure(params)
        # Like what `judge` gives, since `update` has both as branches of one condition.
        some = [
            None if h is None else jnp.zeros(h.shape[1:], _wide(h)) if u is None else u[place].astype(_wide(h))
            for h, u in zip(treedef.flatten_up_to(state.history), differences, strict=True)
        ]
        return moves, some, state

    def best(self, losses: jax.Array) -> jax.Array:
        """() of the lowest loss; 0, to stay, if it is above that of staying plus the slack, or that is not finite."""
        stay = losses[0] + self.s.slack * jnp.abs(losses[0])
        losses = jnp.where(jnp.isfinite(losses), losses, jnp.inf).at[0].set(stay)
        return jnp.where(jnp.isfinite(stay), jnp.argmin(losses), 0)

    def decided(self, state: State, choice: jax.Array, capped: jax.Array) -> State:
        moves, c = choice > 0, state.counts
        counts = c._replace(
            applied=c.applied + moves,
            shortened=c.shortened + (choice > 1),
            rejected=c.rejected + ~moves,
            capped=c.capped + jnp.where(moves, capped, 0),
        )
        return state._replace(
            filled=jnp.zeros_like(state.filled),
            probing=jnp.where(moves & self.s.guard, self.s.probe, -1).astype(jnp.int32),
            before=jnp.stack([jnp.mean(state.values), jnp.var(state.values)]),
            counts=counts,
        )

    def judge(self, state: State, params: Any, extra: dict[str, Any]) -> tuple[jax.Array, list[Any], State]:
        """After the probe: back to the snapshot, which is the last captured state, if the loss is worse."""
        leaves, treedef = jax.tree.flatten(params)
        history = treedef.flatten_up_to(state.history)
        last = [None if h is None else h[-1] for h in history]
        if self.s.loss_fn is not None:
            old = treedef.unflatten([p if h is None else h for p, h in zip(leaves, last, strict=True)])
            reference, now, noise = self.loss_at(old, extra), self.loss_at(params, extra), 0.0
        else:
            reference, now = state.before[0], jnp.mean(state.values)
            noise = 2 * jnp.sqrt((state.before[1] + jnp.var(state.values)) / self.s.probe)
        worse = ~(now <= reference + self.s.margin * jnp.abs(reference) + noise)
        back = [
            None if h is None else h.astype(_wide(h)) - jnp.asarray(p, _wide(h))
            for p, h in zip(leaves, last, strict=True)
        ]
        counts = state.counts._replace(restored=state.counts.restored + worse)
        return worse, back, state._replace(probing=jnp.full_like(state.probing, -1), counts=counts)

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, State]:
        if params is None:
            raise ValueError(
                f"lopt.nowcast.{self.where}: update got params=None; call tx.update(grads, state, params)."
            )
        if self.s.guard and self.s.loss_fn is None and extra.get("value") is None:
            raise ValueError(
                f"lopt.nowcast.{self.where}: the guard has nothing to judge by; valid: loss_fn=, or value=loss in "
                "tx.update, or guard=False."
            )
        if extra.get("value") is not None:
            value = jnp.asarray(extra["value"], jnp.float32).reshape(())
            state = state._replace(values=state.values.at[state.count % self.s.probe].set(value))
        state = self.captured(state, params)
        due, judged = state.filled == self.s.context, state.probing == 0

        like, _ = jax.eval_shape(lambda u, b, p: self.base.update(u, b, p, **extra), updates, state.base, params)

        def step(state: State) -> tuple[Any, State]:
            out, after = self.base.update(updates, state.base, params, **extra)
            left = jnp.where(state.probing > 0, state.probing - 1, state.probing)
            return out, state._replace(base=after, probing=left)

        def special(state: State) -> tuple[Any, State]:
            moves, differences, state = jax.lax.cond(
                due, lambda st: self.nowcast(st, params, extra), lambda st: judge_or_nothing(st), state
            )

            def move(state: State) -> tuple[Any, State]:
                treedef = jax.tree.structure(params)
                out = treedef.unflatten(
                    [
                        None if x is None else jnp.zeros(x.shape, x.dtype) if u is None else u.astype(x.dtype)
                        for x, u in zip(treedef.flatten_up_to(like), differences, strict=True)
                    ]
                )
                fresh = self.base.init(optax.apply_updates(params, out)) if self.s.reset_moments else state.base
                return out, state._replace(base=_ticked(state.base, fresh))

            return jax.lax.cond(moves, move, step, state)

        def judge_or_nothing(state: State) -> tuple[jax.Array, list[Any], State]:
            if self.s.guard:
                return self.judge(state, params, extra)
            # Without the guard nothing is ever judged; this branch is not taken.
            shapes = jax.eval_shape(lambda st: self.nowcast(st, params, extra)[1], state)
            return jnp.zeros((), bool), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), state

        out, state = jax.lax.cond(due | judged, special, step, state)
        return out, state._replace(count=state.count + 1)

    def due(self, state: State) -> jax.Array:
        return ((state.count + 1) % self.interval == 0) & (state.filled == self.s.context - 1)

    def propose(self, state: State, params: Any) -> Proposals:
        state = self.captured(state, params)
        differences, at, capped = self.proposals(state, params, 3)
        return Proposals([_at_place(params, differences, i) for i in range(3)], at, capped)

    def accept(self, state: State, params: Any, proposals: Proposals, losses: Any) -> tuple[Any, State]:
        losses = jnp.stack([jnp.asarray(x, jnp.float32) for x in losses])
        if losses.shape != (len(proposals.params) + 1,):
            raise ValueError(
                f"lopt.nowcast.{self.where}.accept: losses, got shape {losses.shape}; valid: one of params and one "
                f"each of {len(proposals.params)} proposals."
            )
        choice = self.best(losses)
        state = self.captured(state, params)
        state = self.decided(state, choice, proposals.capped[jnp.maximum(choice - 1, 0)])
        new = jax.tree.map(
            lambda *xs: jnp.select([choice == i for i in range(len(xs))], xs) if _float(xs[0]) else xs[0],
            params,
            *proposals.params,
        )
        fresh = self.base.init(new) if self.s.reset_moments else state.base
        moved = jax.tree.map(lambda a, b: jnp.where(choice == 0, a, b), state.base, fresh)
        return new, state._replace(base=_ticked(state.base, moved), count=state.count + 1)


def _at_place(params: Any, differences: list[Any], i: Any) -> Any:
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(
        [p if u is None else (p + u[i]).astype(jnp.result_type(p)) for p, u in zip(leaves, differences, strict=True)]
    )


def _finite(differences: list[Any]) -> jax.Array:
    """[count] whether all of a nowcast is finite."""
    oks = [jnp.all(jnp.isfinite(u), tuple(range(1, u.ndim))) for u in differences if u is not None]
    return jnp.all(jnp.stack(oks), 0) if oks else jnp.zeros(1, bool)


def _wide(x: jax.Array) -> Any:
    """A dtype in which differences are taken: float32, of float64 itself."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _float(p: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(p), jnp.floating)) and bool(jnp.size(p))


def _ticked(old: Any, new: Any) -> Any:
    """The base optimizer's state `new`, its schedules one call after `old`: they go on while moments stand still."""
    kinds = (optax.ScaleByScheduleState, optax.InjectHyperparamsState)
    kinds += tuple(
        getattr(optax, x) for x in ("InjectStatefulHyperparamsState", "WrappedScheduleState") if hasattr(optax, x)
    )

    def tick(a: Any, b: Any) -> Any:
        if not isinstance(a, kinds):
            return b
        changed = {"count": optax.safe_increment(a.count)}
        for name in ("inner_state", "hyperparams_states"):
            if hasattr(a, name):
                changed[name] = _ticked(getattr(a, name), getattr(b, name))
        return b._replace(**changed)

    return jax.tree.map(tick, old, new, is_leaf=lambda x: isinstance(x, kinds))


def _check(where: str, s: Settings, reference_lr: float | None) -> None:
    place = f"lopt.nowcast.{where}"
    for name in ("context", "probe"):
        if not isinstance(getattr(s, name), int | np.integer) or getattr(s, name) < 1:
            raise ValueError(f"{place}: {name}, got {getattr(s, name)!r}; valid: an integer >= 1.")
    if s.period < s.context:
        raise ValueError(f"{place}: period, got {s.period}; valid: at least context, {s.context}.")
    for name in ("margin", "slack", "cap"):
        if not getattr(s, name) >= 0:
            raise ValueError(f"{place}: {name}, got {getattr(s, name)!r}; valid: >= 0.")
    if s.guard and s.probe + 1 >= s.period // s.context:
        raise ValueError(
            f"{place}: probe, got {s.probe}; valid: below period // context - 1 = "
            f"{s.period // s.context - 1}, or the next state is captured before the nowcast is judged."
        )
    if s.lr is not None:
        if reference_lr is None:
            raise ValueError(
                f"{place}: lr is given, but the network does not say at which it was meta-trained; valid: a network "
                "with lr, e.g. network._replace(lr=1e-3), or lr=None."
            )
        if not callable(s.lr) and not s.lr > 0:
            raise ValueError(f"{place}: lr, got {s.lr!r}; valid: > 0, or a function of the call's number.")
