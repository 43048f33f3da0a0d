"""What optax and optax.contrib have, as baselines. Not ours: a line says what is called, and where it is searched."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from lopt.averaging import averaged, eval_params
from lopt.baselines.base import Baseline, Rate, Space, average, decay, define, rate, transform

GRID = Space(0.0, 0.1, False, 0.0, choices=(0.0, 0.01, 0.1))  # a rule that merely regularises must not look fast
ADAM = {"b1": average(0.9), "b2": average(0.999)}
MOMENTUM = {"momentum": average(0.9)}
FREE = rate(1.0, 0.1, 10.0)  # a factor of the step size the method finds
LONGEST = 0.9999  # b3 of AdEMAMix
WARMUP = 0.05  # of the horizon, of the methods that go without a schedule


def sgd(learning_rate: Rate, *, weight_decay: Any, **momentum: Any) -> optax.GradientTransformation:
    """SGD with decoupled decay (Loshchilov & Hutter 2019, Algorithm 1)."""
    steps = optax.trace(momentum["momentum"], momentum["nesterov"]) if momentum else optax.identity()
    return optax.chain(steps, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(learning_rate))


def ademamix(
    learning_rate: Rate, *, num_steps: Any, memory: Any, alpha: Any, **hyper: Any
) -> optax.GradientTransformation:
    """AdEMAMix with the paper's schedulers of alpha and b3 over the horizon, where there is one.

    The slow average's b3 is 1 - 1/(memory · num_steps) and no more than LONGEST, the paper's value at 256,000 updates.
    """
    if num_steps is None:
        return contrib.ademamix(learning_rate, b3=LONGEST, alpha=alpha, **hyper)
    b3 = jnp.clip(1 - 1 / jnp.maximum(memory * num_steps, 1.0), hyper["b1"], LONGEST)
    log_start, log_end = jnp.log(hyper["b1"]), jnp.log(b3)

    def fraction(count: Any) -> Any:
        return jnp.minimum(count / jnp.maximum(num_steps, 1), 1.0)

    def b3_at(count: Any) -> Any:
        f = fraction(count)
        return jnp.minimum(jnp.exp(log_start * log_end / ((1 - f) * log_end + f * log_start)), b3)

    return contrib.ademamix(learning_rate, b3=b3_at, alpha=lambda count: alpha * fraction(count), **hyper)


def schedule_free(
    base: Any, learning_rate: Rate, num_steps: Any, b1: Any, weight_decay: Any
) -> optax.GradientTransformation:
    """Schedule-free with a linear warm-up over the first WARMUP of the horizon, where there is one."""

    def warm(count: Any) -> Any:  # optax counts from 1 in one place and from 0 in the other
        lr = learning_rate(count) if callable(learning_rate) else learning_rate
        return lr if num_steps is None else lr * jnp.minimum((count + 1) / jnp.maximum(WARMUP * num_steps, 1.0), 1.0)

    late = lambda count: warm(count - 1)  # noqa: E731
    steps = optax.chain(base, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(warm))
    return contrib.schedule_free(steps, late, b1=b1)


def schedule_free_adamw(learning_rate: Rate, *, num_steps: Any, b1: Any, b2: Any, weight_decay: Any):
    """Schedule-free AdamW: no momentum in the base."""
    return schedule_free(
        optax.scale_by_rms(b2, eps_in_sqrt=False, bias_correction=True), learning_rate, num_steps, b1, weight_decay
    )


def schedule_free_sgd(learning_rate: Rate, *, num_steps: Any, b1: Any, weight_decay: Any):
    """Schedule-free SGD."""
    return schedule_free(optax.identity(), learning_rate, num_steps, b1, weight_decay)


class LookaheadState(NamedTuple):
    """State of `lookahead`."""

    inner: Any  # of optax.lookahead
    slow: Any  # like params


def lookahead(learning_rate: Rate, *, slow_step_size: Any, b1: Any, b2: Any) -> optax.GradientTransformation:
    """optax.lookahead around Adam, sync period 5, with the slow weights in the state and not in the parameters."""
    fast = optax.adam(learning_rate, b1=b1, b2=b2)
    inner: Any = optax.lookahead(fast, sync_period=5, slow_step_size=slow_step_size)

    def init(params: Any) -> LookaheadState:
        return LookaheadState(inner.init(optax.LookaheadParams.init_synced(params)), params)

    def update(updates: Any, state: LookaheadState, params: Any = None, **extra: Any) -> tuple[Any, LookaheadState]:
        both = optax.LookaheadParams(fast=params, slow=state.slow)
        updates, after = inner.update(updates, state.inner, both)
        return updates.fast, LookaheadState(after, optax.apply_updates(state.slow, updates.slow))

    return transform(init, update)


def sam(learning_rate: Rate, *, rho: Any, momentum: Any) -> optax.GradientTransformation:
    """SAM around SGD with momentum, the ascent inside the update."""
    # Not optax.contrib.normalize: at a gradient of 0 it divides by 0.
    ascent = optax.chain(normalized(), optax.sgd(rho))
    inner = contrib.sam(optax.sgd(learning_rate, momentum=momentum), ascent, opaque_mode=True)

    def update(updates: Any, state: Any, params: Any = None, *, grad_fn: Any, **extra: Any) -> tuple[Any, Any]:
        return inner.update(updates, state, params, grad_fn=lambda p, i: grad_fn(p))

    return transform(inner.init, update)


def normalized() -> optax.GradientTransformation:
    """g / |g| over all tensors, 0 where g is."""

    def scale(g: Any) -> Any:
        norm = jnp.sqrt(sum(jnp.sum(x * x) for x in jax.tree.leaves(g)))
        return jax.tree.map(lambda x: x / jnp.where(norm > 0, norm, 1.0), g)

    return optax.stateless(lambda g, params: scale(g))


def lbfgs(learning_rate: Rate) -> optax.GradientTransformation:
    """L-BFGS with optax's zoom line search, memory 10."""
    inner = optax.lbfgs(learning_rate)

    def update(updates: Any, state: Any, params: Any = None, *, value: Any, value_fn: Any, **extra: Any):
        return inner.update(updates, state, params, value=value, grad=updates, value_fn=value_fn)

    return transform(inner.init, update)


def sophia(learning_rate: Rate, **hyper: Any) -> optax.GradientTransformation:
    """Sophia-H, the Hessian every 10 steps."""
    inner = contrib.sophia(learning_rate, **hyper)

    def update(updates: Any, state: Any, params: Any = None, *, value_fn: Any, **extra: Any) -> tuple[Any, Any]:
        return inner.update(updates, state, params, obj_fn=value_fn)

    return transform(inner.init, update)


def momo(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformation:
    """Momo takes the loss and nothing else."""

    def update(updates: Any, state: Any, params: Any = None, *, value: Any, **extra: Any) -> tuple[Any, Any]:
        return inner.update(updates, state, params, value=value)

    return transform(inner.init, update)


def prodigy(learning_rate: Rate, *, b1: Any, b2: Any, weight_decay: Any) -> optax.GradientTransformation:
    """Prodigy with its safeguard, without which a warm-up that starts low is taken for a wrong estimate."""
    return contrib.prodigy(learning_rate, betas=(b1, b2), weight_decay=weight_decay, safeguard_warmup=True)


def evaluated(state: Any, params: Any) -> Any:
    """The average of schedule-free, x in the paper."""
    return contrib.schedule_free_eval_params(state, params)


VALUE, VALUE_FN, GRAD_FN = frozenset({"value"}), frozenset({"value_fn"}), frozenset({"grad_fn"})
SGD_LR, MOMENTUM_LR, SIGN_LR = rate(0.1, 1e-3, 10.0), rate(0.01, 1e-4, 1.0), rate(1e-4, 1e-5, 10**-1.5)
ADAM_LR = rate(1e-3)
POWER = 8.0  # of the average

BASELINES: tuple[Baseline, ...] = (
    define("sgd", sgd, {"lr": SGD_LR, "weight_decay": GRID}, source="Robbins & Monro (1951)"),
    define(
        "momentum",
        lambda lr, **h: sgd(lr, weight_decay=0.0, nesterov=False, **h),
        {"lr": MOMENTUM_LR} | MOMENTUM,
        source="Polyak (1964)",
    ),
    define(
        "nesterov",
        lambda lr, **h: sgd(lr, weight_decay=0.0, nesterov=True, **h),
        {"lr": MOMENTUM_LR} | MOMENTUM,
        source="Sutskever et al. (2013)",
    ),
    define("adagrad", lambda lr: optax.adagrad(lr), {"lr": rate(0.01, 1e-3, 1.0)}, source="Duchi et al. (2011)"),
    define(
        "adadelta",
        lambda lr, **h: optax.adadelta(lr, **h),
        {"lr": rate(1.0, 1e-2, 100.0), "rho": average(0.9)},
        source="Zeiler (2012), arXiv:1212.5701",
    ),
    define(
        "rmsprop",
        lambda lr, **h: optax.rmsprop(lr, **h),
        {"lr": rate(1e-3, 1e-5, 0.1), "decay": average(0.9), "momentum": Space(0.0, 0.99, False, 0.0)},
        source="Tieleman & Hinton (2012)",
    ),
    define(
        "adam",
        lambda lr, **h: optax.adam(lr, **h),
        {"lr": ADAM_LR} | ADAM,
        source="Kingma & Ba (2015), arXiv:1412.6980",
    ),
    define(
        "adamw",
        lambda lr, **h: optax.adamw(lr, **h),
        {"lr": ADAM_LR, "weight_decay": GRID} | ADAM,
        source="Loshchilov & Hutter (2019), arXiv:1711.05101",
    ),
    define(
        "averaged_adamw",
        lambda lr, **h: averaged(optax.adamw(lr, **h), POWER),
        {"lr": ADAM_LR, "weight_decay": GRID} | ADAM,
        eval_params=eval_params,
        source="Shamir & Zhang (2013), arXiv:1212.1824",
        notes="AdamW, judged by the polynomial-decay average of its parameters",
    ),
    define(
        "nadamw",
        lambda lr, **h: optax.nadamw(lr, **h),
        {"lr": ADAM_LR, "weight_decay": GRID} | ADAM,
        source="Dozat (2016); decay as AdamW",
    ),
    define(
        "amsgrad",
        lambda lr, **h: optax.amsgrad(lr, **h),
        {"lr": ADAM_LR} | ADAM,
        source="Reddi et al. (2018), arXiv:1904.09237",
    ),
    define(
        "radam",
        lambda lr, **h: optax.radam(lr, **h),
        {"lr": ADAM_LR} | ADAM,
        source="Liu et al. (2020), arXiv:1908.03265",
    ),
    define(
        "adamax",
        lambda lr, **h: optax.adamax(lr, **h),
        {"lr": ADAM_LR} | ADAM,
        source="Kingma & Ba (2015), arXiv:1412.6980",
    ),
    define(
        "adabelief",
        lambda lr, **h: optax.adabelief(lr, **h),
        {"lr": ADAM_LR} | ADAM,
        source="Zhuang et al. (2020), arXiv:2010.07468",
    ),
    define(
        "yogi", lambda lr, **h: optax.yogi(lr, **h), {"lr": rate(0.01, 1e-4, 1.0)} | ADAM, source="Zaheer et al. (2018)"
    ),
    define(
        "adan",
        lambda lr, **h: optax.adan(lr, **h),
        {"lr": ADAM_LR, "b1": average(0.98), "b2": average(0.92), "b3": average(0.99), "weight_decay": decay(0.0)},
        source="Xie et al. (2022), arXiv:2208.06677",
        notes="b are the paper's 1 - beta",
    ),
    define(
        "adafactor",
        lambda lr, **h: optax.adafactor(lr, **h),
        {"lr": rate(0.01, 1e-3, 1.0), "decay_rate": Space(0.5, 1.0, False, 0.8)},
        source="Shazeer & Stern (2018), arXiv:1804.04235",
        notes="relative steps: lr multiplies the tensor's RMS; factored from 128 rows and columns on: below, as on all "
        "of mini, it keeps the full second moment",
    ),
    define(
        "lamb",
        lambda lr, **h: optax.lamb(lr, **h),
        {"lr": rate(0.01, 1e-4, 1.0), "weight_decay": decay()} | ADAM,
        source="You et al. (2020), arXiv:1904.00962",
    ),
    define(
        "lars",
        lambda lr, **h: optax.lars(lr, **h),
        {"lr": rate(1.0, 1e-2, 100.0), "weight_decay": decay()} | MOMENTUM,
        source="You et al. (2017), arXiv:1708.03888",
        notes="trust coefficient .001",
    ),
    define(
        "lion",
        lambda lr, **h: optax.lion(lr, **h),
        {"lr": SIGN_LR, "b1": average(0.9), "b2": average(0.99), "weight_decay": decay(0.0)},
        source="Chen et al. (2023), arXiv:2302.06675",
    ),
    define(
        "signum",
        lambda lr, beta: optax.chain(
            optax.ema(beta, debias=False), optax.scale_by_sign(), optax.scale_by_learning_rate(lr)
        ),
        {"lr": SIGN_LR, "beta": average(0.9)},
        source="Bernstein et al. (2018), arXiv:1802.04434",
    ),
    define(
        "novograd",
        lambda lr, **h: optax.novograd(lr, **h),
        {"lr": rate(0.01, 1e-4, 1.0), "b1": average(0.95), "b2": average(0.98), "weight_decay": decay()},
        source="Ginsburg et al. (2019), arXiv:1905.11286",
    ),
    define(
        "sophia",
        sophia,
        {
            "lr": ADAM_LR,
            "b1": average(0.965),
            "b2": average(0.99),
            "gamma": Space(1e-3, 0.1, True, 0.01),
            "weight_decay": decay(0.0),
        },
        needs=VALUE_FN,
        source="Liu et al. (2023), arXiv:2305.14342",
        notes="Hutchinson with random signs, the same whatever the seed, every 10 steps (under vmap computed at each)",
    ),
    define(
        "ademamix",
        ademamix,
        {
            "lr": ADAM_LR,
            "b1": average(0.9),
            "b2": average(0.999),
            "memory": Space(0.02, 0.5, True, 0.1),
            "alpha": Space(1.0, 10.0, False, 5.0),
            "weight_decay": decay(),
        },
        horizon=True,
        source="Pagliardini et al. (2024), arXiv:2409.03137",
        version=2,
        notes="alpha and b3 grow over the horizon; the slow average is over a tenth of it (memory), over 10000 updates "
        "at most, which is the paper's .9999 for runs of hundreds of thousands",
    ),
    define(
        "adopt",
        lambda lr, **h: contrib.adopt(lr, **h),
        {"lr": ADAM_LR, "b1": average(0.9), "b2": average(0.9999)},
        source="Taniguchi et al. (2024), arXiv:2411.02853",
    ),
    define(
        "madgrad",
        lambda lr, **h: contrib.madgrad(lr, **h),
        {"lr": rate(0.01, 1e-4, 1.0)} | MOMENTUM,
        source="Defazio & Jelassi (2021), arXiv:2101.11075",
    ),
    define(
        "muon",
        lambda lr, **h: contrib.muon(lr, adam_learning_rate=lr, consistent_rms=0.2, **h),
        {"lr": ADAM_LR, "beta": average(0.95), "weight_decay": decay()},
        source="Jordan et al. (2024), kellerjordan.github.io/posts/muon; Liu et al. (2025), arXiv:2502.16982",
        notes="matrices only, their step's RMS .2 lr, as Adam's is, which tensors of any other rank get at the same "
        "lr: biases, and convolutions, so that on cnn and resnet it is Adam but for the last layer",
    ),
    define(
        "prodigy",
        prodigy,
        {"lr": FREE, "weight_decay": decay()} | ADAM,
        source="Mishchenko & Defazio (2023), arXiv:2306.06101",
    ),
    define(
        "dadapt_adamw",
        lambda lr, *, b1, b2, weight_decay: contrib.dadapt_adamw(lr, betas=(b1, b2), weight_decay=weight_decay),
        {"lr": FREE, "weight_decay": decay()} | ADAM,
        source="Defazio & Mishchenko (2023), arXiv:2301.07733",
    ),
    define(
        "dog",
        lambda lr: contrib.dog(lr),
        {"lr": FREE},
        source="Ivgi et al. (2023), arXiv:2302.12022",
        notes="the last iterate, not the paper's average",
    ),
    define("dowg", lambda lr: contrib.dowg(lr), {"lr": FREE}, source="Khaled et al. (2023), arXiv:2305.16284"),
    define(
        "mechanic",
        lambda lr, *, b1, b2: contrib.mechanize(optax.adam(lr, b1=b1, b2=b2)),
        {"lr": FREE} | ADAM,
        source="Cutkosky et al. (2023), arXiv:2306.00144",
        notes="around Adam",
    ),
    define(
        "momo",
        lambda lr, **h: momo(contrib.momo(lr, **h)),
        {"lr": rate(1.0, 1e-2, 100.0), "beta": average(0.9)},
        needs=VALUE,
        source="Schaipp et al. (2023), arXiv:2305.07583",
        notes="lower bound of the loss 0",
    ),
    define(
        "momo_adam",
        lambda lr, **h: momo(contrib.momo_adam(lr, **h)),
        {"lr": rate(0.01, 1e-4, 1.0)} | ADAM,
        needs=VALUE,
        source="Schaipp et al. (2023), arXiv:2305.07583",
        notes="lower bound of the loss 0",
    ),
    define(
        "cocob",
        lambda lr, **h: contrib.cocob(lr, **h),
        {"alpha": Space(10.0, 1000.0, True, 100.0)},
        schedules=("constant",),
        source="Orabona & Tommasi (2017), arXiv:1705.07795",
    ),
    define(
        "schedule_free_adamw",
        schedule_free_adamw,
        {"lr": rate(2.5e-3), "weight_decay": decay()} | ADAM,
        horizon=True,
        eval_params=evaluated,
        schedules=("constant",),
        source="Defazio et al. (2024), arXiv:2405.15682",
        notes="linear warm-up over the first 5 % of the horizon",
    ),
    define(
        "schedule_free_sgd",
        schedule_free_sgd,
        {"lr": rate(1.0, 1e-2, 100.0), "b1": average(0.9), "weight_decay": decay()},
        horizon=True,
        eval_params=evaluated,
        schedules=("constant",),
        source="Defazio et al. (2024), arXiv:2405.15682",
        notes="linear warm-up over the first 5 % of the horizon",
    ),
    define(
        "lookahead",
        lookahead,
        {"lr": ADAM_LR, "slow_step_size": Space(0.2, 1.0, False, 0.5)} | ADAM,
        eval_params=lambda state, params: state.slow,
        source="Zhang et al. (2019), arXiv:1907.08610",
        notes="around Adam, every 5 steps",
    ),
    define(
        "sam",
        sam,
        {"lr": MOMENTUM_LR, "rho": Space(5e-3, 0.5, True, 0.05)} | MOMENTUM,
        needs=GRAD_FN,
        source="Foret et al. (2021), arXiv:2010.01412",
        notes="around SGD with momentum; two gradients a step",
    ),
    define(
        "lbfgs",
        lbfgs,
        {},
        schedules=("constant",),
        needs=frozenset({"value", "value_fn"}),
        source="Liu & Nocedal (1989)",
        notes="memory 10, zoom line search of at most 20 evaluations a step",
        deterministic_only=True,
    ),
)
