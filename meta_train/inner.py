"""The only file where a rule meets a task: one inner step, its meta-loss, and when an inner run ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lopt.averaging import eval_params
from lopt.base import LearnedOptimizer, mappable, proximal, unknown
from lopt.prox import Penalty
from tasks.base import Task

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

META_LOSSES = ("train", "fresh", "validation")
OBJECTIVES = ("mean", "final", "last")
NORMALISE = ("none", "init", "reference")


class Particle(NamedTuple):
    """One inner trajectory."""

    params: Any  # inner weights
    opt_state: Any  # of the bound rule
    grad_state: Any  # of the task's grad_transform, () without one
    phi: Any  # task parameters
    t: jax.Array  # () int32, inner steps since reset
    horizon: jax.Array  # () int32, T: inner steps until the next reset
    scale: Any = ()  # () what meta-losses are divided by, () where that is no matter of the particle


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
      longest: the greatest horizon.
      first: like `reset`, for the particles a meta-training begins with; None: `reset`. Particles that all began at
        t = 0 with one horizon would march in step, and each meta-step would see one phase of training only.
      features: of a rule that steps many particles of one theta best as one, a prefix tree of the particle: how many
        axes of features its arrays have in front, behind which the particles are to lie. None: of any other.
    """

    reset: Callable[[jax.Array], Any]
    step: Callable[[Any, Any, jax.Array], tuple[Any, jax.Array, jax.Array, jax.Array]]
    theta_axes: Any
    shortest: int
    longest: int
    first: Callable[[jax.Array], Any] | None = None
    features: Any = None


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


def weight(t: Int[Array, ""], horizon: Int[Array, ""], last: int) -> Float[Array, ""]:
    """Of the meta-loss of step t = 1 ... T, such that the mean over an episode is that over its last steps alone."""
    return jnp.where(t > horizon - last, horizon.astype(jnp.float32) / last, 0.0)


def make_inner(
    rule: LearnedOptimizer,
    task: Task,
    *,
    horizon: Horizon,
    meta_loss: str = "validation",
    loss_limit: float = 3.0,
    objective: str = "mean",
    last_steps: int = 50,
    normalise: str = "none",
    reference_loss: float = 0.0,
    stagger: bool = False,
    multipliers: Any = None,
    judge_average: bool = False,
) -> Inner:
    """Couple a rule and a task.

    Args:
      rule: its `bind` is called inside the step, with the particle's horizon as `num_steps`.
      task: `task.data` may be traced.
      horizon: of inner runs.
      meta_loss: the loss on the "train" batch of the step (before its update, at no cost), on a "fresh" training batch
        or on a "validation" batch (after the update).
      loss_limit: meta-losses above it, and non-finite ones, count as this much, after normalising.
      objective: the "mean" of an episode's meta-losses, the "final" one, or the mean of the "last" steps. Under these
        two a trajectory that diverges is left to run to its horizon, where its loss counts.
      last_steps: of objective "last".
      normalise: divide meta-losses by nothing ("none"), by the loss at "init" of the same kind of batch, or by
        `reference_loss` ("reference"). A particle whose loss at init is not positive has no such measure: all its
        meta-losses count as diverged.
      reference_loss: what a good optimizer reaches on this task.
      stagger: the clocks of the first particles start at a uniformly drawn time, so that their first episodes are cut
        short and they do not march in step.
      multipliers: tree like the task's params of factors of each tensor's direction (muP's), or None.
      judge_average: measure meta-losses after the update at the average that the rule keeps (`lopt.eval_params`), not
        at the parameters.

    Raises:
      ValueError: for an unknown name or a number out of range, and for a rule with a proximal operator on a task
        without `composite`.
    """
    where = "meta_train.make_inner"
    choices = (meta_loss, META_LOSSES), (objective, OBJECTIVES), (normalise, NORMALISE)
    for name, (got, valid) in zip(("meta_loss", "objective", "normalise"), choices, strict=True):
        if got not in valid:
            raise unknown(where, name, got, valid)
    if not loss_limit > 0:
        raise ValueError(f"{where}: loss_limit, got {loss_limit}; valid: > 0.")
    if objective == "last" and not 1 <= last_steps <= horizon.low:
        raise ValueError(f"{where}: last_steps, got {last_steps}; valid: 1 to {horizon.low}, the shortest horizon.")
    if normalise == "reference" and not reference_loss > 0:
        raise ValueError(f"{where}: reference_loss, got {reference_loss}; valid: > 0, since losses are divided by it.")
    averages = bool(rule.settings.get("average"))
    if judge_average and (not averages or meta_loss == "train"):
        raise ValueError(
            f"{where}: judge_average, got True for rule {rule.name} with average={rule.settings.get('average')} and "
            f"meta_loss={meta_loss!r}; valid: a rule that keeps an average, and a meta-loss after the update (fresh, "
            "validation)."
        )
    last = {"mean": 0, "final": 1, "last": last_steps}[objective]
    split = "validation" if meta_loss == "validation" else "train"
    value_and_grad = task.value_and_grad or jax.value_and_grad(task.loss)
    # A rule with a proximal operator sees the smooth part's gradient; any other a subgradient of the whole.
    composite = task.composite if proximal(rule) else None
    if proximal(rule) and composite is None:
        raise ValueError(
            f"{where}: rule {rule.name} on {task.name or task.family}, whose loss has no known smooth part, penalty "
            "and Lipschitz constant; valid: a task with `composite` (lasso, logistic_l1, structured_regression, "
            "matrix_completion; not augmented), or a rule without a proximal operator (l2o_dm, rnnprop, …)."
        )
    if composite:
        smooth = jax.grad(composite.smooth)
        value_and_grad = lambda *args: (task.loss(*args), smooth(*args))  # noqa: E731

    def bind(theta: Any, num_steps: Any, phi: Any) -> optax.GradientTransformationExtraArgs:
        more: dict[str, Any] = {"mapped": True} if mappable(rule) else {}
        if averages and not judge_average:
            more["average"] = 0  # nobody would look at it
        if multipliers is not None:
            more["multipliers"] = multipliers
        if composite:
            more |= {"prox": Penalty(composite.penalty(phi), composite.kind), "lipschitz": composite.lipschitz(phi)}
        # A trajectory that is no longer finite is reset by its estimator, so nothing need be skipped here.
        return rule.bind(theta, num_steps=num_steps, nonfinite="propagate", diagnostics=False, **more)

    template = jax.eval_shape(rule.init_theta, jax.random.key(0))

    def reset(key: jax.Array) -> Particle:
        phi_key, init_key, horizon_key, scale_key = jax.random.split(key, 4)
        phi = task.sample(phi_key)
        params = task.init(init_key, phi)
        steps = horizon.sample(horizon_key)
        # No state depends on theta's values, so zeros of its shapes do.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), template)
        grad_state = task.grad_transform.init(params) if task.grad_transform else ()
        opt_state, t = bind(zeros, steps, phi).init(params), jnp.zeros((), jnp.int32)
        return Particle(params, opt_state, grad_state, phi, t, steps, init_scale(scale_key, params, phi))

    def init_scale(key: jax.Array, params: Any, phi: Any) -> Any:
        if normalise != "init":
            return ()
        batch_key, loss_key = jax.random.split(key)
        loss = task.loss(params, loss_key, phi, task.batch(batch_key, phi, task.data, split))
        return jnp.where(loss > 0, loss, jnp.nan)

    def first(key: jax.Array) -> Particle:
        reset_key, clock_key = jax.random.split(key)
        particle = reset(reset_key)
        return particle._replace(t=jax.random.randint(clock_key, (), 0, particle.horizon))

    def step(theta: Any, particle: Particle, key: jax.Array):
        batch_key, loss_key, meta_batch_key, meta_key = jax.random.split(key, 4)
        batch = task.batch(batch_key, particle.phi, task.data, "train")
        value, grads = value_and_grad(particle.params, loss_key, particle.phi, batch)
        grad_state = particle.grad_state
        if task.grad_transform:
            grads, grad_state = task.grad_transform.update(grads, grad_state, particle.params)
        extra = {}
        if composite:
            extra["grad_fn"] = lambda params: smooth(params, loss_key, particle.phi, batch)
        tx = bind(theta, particle.horizon, particle.phi)
        updates, opt_state = tx.update(grads, particle.opt_state, particle.params, value=value, **extra)
        params = optax.apply_updates(particle.params, updates)
        if meta_loss != "train":
            meta_batch = task.batch(meta_batch_key, particle.phi, task.data, split)
            value = task.loss(eval_params(opt_state, params), meta_key, particle.phi, meta_batch)
        if normalise != "none":
            value = value / (particle.scale if normalise == "init" else reference_loss)
        diverged = ~jnp.isfinite(value)
        value = jnp.where(diverged, loss_limit, jnp.minimum(value, loss_limit))
        t = particle.t + 1
        done = t >= particle.horizon
        if last:
            value = value * weight(t, particle.horizon, last)
            diverged = diverged & done  # a reset before would spare it the loss that counts
        moved = particle._replace(params=params, opt_state=opt_state, grad_state=grad_state, t=t)
        return moved, value, done, diverged

    axes: Any = Particle(0, 0, 0, phi=None, t=None, horizon=None, scale=None)  # pyrefly: ignore
    features = _in_front(jax.eval_shape(reset, jax.random.key(0))) if mappable(rule) else None
    return Inner(reset, step, axes, horizon.low, horizon.high, first if stagger else None, features)


def _in_front(like: Particle) -> Any:
    """1 for arrays [F, ...] that the optimizer keeps of the task's only tensor, 0 for all others."""
    shapes = [x.shape for x in jax.tree.leaves(like.params)]
    state = jax.tree.map(lambda x: int(x.ndim > 1 and [x.shape[1:]] == shapes), like.opt_state)
    return Particle(0, state, 0, 0, 0, 0, 0)  # pyrefly: ignore
