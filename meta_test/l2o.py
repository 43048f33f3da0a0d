"""Composite convex problems: relative gaps to certified optima, of learned rules and classical methods.

Instances of a set are drawn anew, in float64, by the seed; all methods start at 0. A gap is (F - F*) / F*, floored at
1e-12, at the point y where the gradient is taken and at the last output x of the proximal operator. What a classical
method has to tune (momentum, rate, ADMM's step) is tuned on other instances of the problem's first set, by its mean gap
at TUNED_AT; constants of Lipschitz are the true ones.
"""

from __future__ import annotations

import argparse
import csv
import io
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lopt
import tasks
from lopt import prox, proximal
from lopt.rules.l2o_pa import solution
from meta_test import drawing
from meta_test.report import dump, machine, write
from tasks import certified
from tasks.base import Task

if TYPE_CHECKING:
    from jaxtyping import Float

KS = (10, 50, 100, 1000)
TUNED_AT, TUNING_INSTANCES, TUNING_SEED = 50, 64, 1
FLOOR = 1e-12
LARGE = 64  # instances at most where a matrix has more than LARGE_SIZE elements
LARGE_SIZE = 20_000
FILES = ("l2o.json", "l2o.md", "l2o.csv", "l2o.svg")


class Problem(NamedTuple):
    """A kind of problem and its sets of instances, the first one that of meta-training."""

    family: str
    smooth: certified.Smooth
    sets: Mapping[str, Mapping[str, Any]]  # name -> settings of the family


PROBLEMS = {
    "lasso": Problem(
        "lasso",
        certified.SQUARED,
        {
            "20x40": {},
            "64x128": {"rows": 64, "columns": 128, "nonzeros": 10},
            "250x500": {"rows": 250, "columns": 500, "nonzeros": 50},
            "20x40, ill-conditioned": {
                "nonzeros": 8,
                "magnitude": (5.0, 5.0),
                "shift": (0.3, 0.3),
                "log10_strength": (-2.0, -2.0),
            },
        },
    ),
    "logistic": Problem(
        "logistic_l1",
        certified.LOGISTIC,
        {
            "100x20": {},
            "1000x50": {"rows": 1000, "columns": 50, "nonzeros": 20},
            "100x20, ill-conditioned": {"shift": (0.3, 0.3), "log10_strength": (-2.0, -2.0)},
        },
    ),
}


class Method(NamedTuple):
    """An optimizer of instances.

    Fields:
      make: `(instance, **tuned) -> optax transform`.
      proximal: whether gradients are those of the smooth part; otherwise subgradients of F.
      grid: of what is tuned, name -> values; empty for nothing.
    """

    make: Callable[..., optax.GradientTransformationExtraArgs]
    proximal: bool = True
    grid: Mapping[str, Sequence[float]] = {}


class Instances(NamedTuple):
    """N instances of a set and their certified optima."""

    phi: Any  # leading axis N
    best: Float[np.ndarray, " N"]
    gap: float  # the largest duality gap of `best`, relative


def draw(problem: Problem, name: str, count: int, seed: int) -> tuple[Task, Instances]:
    """Instances and their optima. Raises RuntimeError where an optimum is not certified to FLOOR."""
    task = tasks.make(problem.family, **problem.sets[name])
    phi = jax.jit(jax.vmap(task.sample))(jax.random.split(jax.random.key(seed), count))
    found = certified.minimum(problem.smooth, phi.W, phi.b, float(phi.strength[0]))  # one strength a set
    relative = float(np.max(found.gap / found.value))
    if relative > FLOOR:
        raise RuntimeError(f"lopt-eval l2o: the optima of {name} are certified to {relative:.1e} only.")
    return task, Instances(phi, found.value, relative)


def classical(problem: Problem) -> dict[str, Method]:
    """The hand-designed methods, by name."""
    rates = tuple(10.0 ** np.arange(-3, 0.51, 0.5))

    def both(phi: Any) -> dict[str, Any]:
        return {"lipschitz": phi.lipschitz, "prox": prox.l1(phi.strength)}

    methods = {
        "ISTA": Method(lambda phi: proximal.ista(**both(phi))),
        "FISTA": Method(lambda phi: proximal.fista(**both(phi))),
        "FISTA, gradient restart": Method(lambda phi: proximal.fista(**both(phi), restart="gradient")),
        "FISTA, function restart": Method(lambda phi: proximal.fista(**both(phi), restart="function")),
        "momentum, tuned": Method(
            lambda phi, a: proximal.momentum(**both(phi), a=a), grid={"a": (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)}
        ),
        "Adam, subgradients, tuned": Method(lambda phi, lr: optax.adam(lr), proximal=False, grid={"lr": rates}),
        "Adam-HD, subgradients, tuned": Method(
            lambda phi, lr: proximal.adam_hd(lr=lr, beta=1e-4), proximal=False, grid={"lr": rates}
        ),
    }
    if problem.family == "lasso":

        def solve(phi: Any, step: float) -> Callable[[Any, Any], Any]:
            gram, at_b = phi.W.T @ phi.W, phi.W.T @ phi.b
            inverse = jnp.linalg.inv(gram + jnp.eye(len(gram)) / step)  # once, and not in every iteration
            return lambda v, _: inverse @ (at_b + v / step)

        methods["ADMM, tuned"] = Method(
            lambda phi, step: proximal.admm(prox_f=solve(phi, step), prox=prox.l1(phi.strength), step=step),
            grid={"step": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)},
        )
    return methods


def learned(source: str) -> Method:
    """A meta-trained rule, untuned. Raises ValueError or OSError for no artifact."""
    rule, theta = lopt.read(source)
    if rule.name == "l2o_pa":
        return Method(lambda phi: rule.bind(theta, prox=prox.l1(phi.strength), lipschitz=phi.lipschitz))
    if rule.needs:
        raise ValueError(f"lopt-eval l2o: {source} is {rule.name}, which needs {', '.join(rule.needs)}; valid: none.")
    return Method(lambda phi: rule.bind(theta), proximal=False)


def gaps(task: Task, method: Method, instances: Instances, steps: int, **tuned: Any) -> Float[np.ndarray, "2 K N"]:
    """Relative gaps at y and x before each of `steps` updates and after the last."""
    if task.composite is None:
        raise ValueError(f"lopt-eval l2o: {task.name} has no proximal structure; valid: lasso, logistic_l1.")
    key, smooth_part = jax.random.key(0), task.composite.smooth

    def one(phi: Any) -> Any:
        batch = task.batch(key, phi, task.data, "validation")
        whole = lambda x: task.loss(x, key, phi, batch)  # noqa: E731
        smooth = jax.grad(lambda x: smooth_part(x, key, phi, batch))
        gradient = smooth if method.proximal else jax.grad(whole)
        tx = optax.with_extra_args_support(method.make(phi, **tuned))
        y = task.init(key, phi).astype(phi.W.dtype)

        def at_x(y: Any, state: Any) -> Any:
            if hasattr(state, "leaves") and hasattr(state.leaves, "x"):
                return solution(state)
            return getattr(state, "x", y)

        def step(carry: Any, _: None) -> Any:
            y, state = carry
            out = whole(y), whole(at_x(y, state))
            updates, state = tx.update(gradient(y), state, y, value_fn=whole, grad_fn=gradient)
            return (optax.apply_updates(y, updates), state), out

        return jnp.stack(jax.lax.scan(step, (y, tx.init(y)), None, length=steps + 1)[1])

    values = np.asarray(jax.jit(jax.vmap(one, out_axes=2))(instances.phi))
    relative = (values - instances.best) / instances.best
    return np.maximum(np.where(np.isfinite(relative), relative, np.inf), FLOOR)


def tune(task: Task, method: Method, instances: Instances) -> dict[str, float]:
    """The value of the least mean gap at y after TUNED_AT steps; {} where there is nothing to tune."""
    if not method.grid:
        return {}
    ((name, values),) = method.grid.items()
    scores = [gaps(task, method, instances, TUNED_AT, **{name: value})[0, -1].mean() for value in values]
    return {name: float(values[int(np.argmin(scores))])}


class Result(NamedTuple):
    """Of a method on a set."""

    method: str
    instances: str
    tuned: dict[str, float]
    curves: Float[np.ndarray, "2 K N"]  # gaps at y and x by step


def compare(
    problem: Problem, sources: Sequence[str], count: int, seed: int, say: Callable[[str], None]
) -> tuple[list[Result], dict[str, Instances]]:
    """Every method on every set."""
    methods = {**{f"l2o:{source}": learned(source) for source in sources}, **classical(problem)}
    first = next(iter(problem.sets))
    task, others = draw(problem, first, TUNING_INSTANCES, TUNING_SEED + seed)
    chosen = {name: tune(task, method, others) for name, method in methods.items()}
    results, drawn = [], {}
    for name, settings in problem.sets.items():
        size = settings.get("rows", 20) * settings.get("columns", 40)
        began = time.perf_counter()
        task, instances = draw(problem, name, min(count, LARGE) if size > LARGE_SIZE else count, seed)
        drawn[name] = instances
        for label, method in methods.items():
            curves = gaps(task, method, instances, KS[-1], **chosen[label])
            results.append(Result(label, name, chosen[label], curves))
            jax.clear_caches()
        say(f"{name}: {len(instances.best)} instances, {time.perf_counter() - began:.0f} s")
    return results, drawn


def l2o(args: argparse.Namespace) -> int:
    """The command."""
    problem = PROBLEMS[args.problem]
    sources = [source for source in args.optimizers.split(",") if source]
    with jax.enable_x64(True):
        results, drawn = compare(problem, sources, args.instances, args.seed, lambda text: print(text, flush=True))
    record = {
        "command": args.written,
        "machine": machine(),
        "sets": {name: {"instances": len(one.best), "certified_to": one.gap} for name, one in drawn.items()},
        "tuned": {result.method: result.tuned for result in results if result.tuned},
        "rows": rows(results),
    }
    page = as_markdown(record, results)
    contents = (dump(record), page, as_csv(results), picture(results))
    write(args.out, dict(zip(FILES, contents, strict=True)))
    print(page)
    print(f"written to {args.out}: {', '.join(FILES)}")
    return 0


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One a set, method, point and k: mean and median gap; None where a mean is infinite."""
    out = []
    for result in results:
        for point, curves in zip(("y", "x"), result.curves, strict=True):
            for k in KS:
                mean, median = float(curves[k].mean()), float(np.median(curves[k]))
                numbers = {"mean": mean, "median": median}
                finite = {key: value if np.isfinite(value) else None for key, value in numbers.items()}
                out.append({"set": result.instances, "method": result.method, "at": point, "k": k, **finite})
    return out


def as_csv(results: Sequence[Result]) -> str:
    out = io.StringIO()
    found = rows(results)
    writer = csv.DictWriter(out, [*found[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return out.getvalue()


def as_markdown(record: Mapping[str, Any], results: Sequence[Result]) -> str:
    """A table a set; the least mean at each k in bold, all within a tenth of it too."""
    parts = [
        "# Relative gaps (F - F*) / F*",
        "",
        f"Mean / median over instances, floored at {FLOOR:g}; made by `{record['command']}`.",
    ]
    for name, about in record["sets"].items():
        here = [result for result in results if result.instances == name]
        means = {r.method: [r.curves[i, k].mean() for i in (0, 1) for k in KS] for r in here}
        least = np.min(list(means.values()), axis=0)
        head = ["method", *(f"y, k = {k}" for k in KS), *(f"x, k = {k}" for k in KS)]
        parts += [
            "",
            f"## {name}",
            f"{about['instances']} instances, optima certified to {about['certified_to']:.1e}.",
            "",
            "| " + " | ".join(head) + " |",
            "|:--" + "|--:" * (len(head) - 1) + "|",
        ]
        for r in here:
            cells = [
                f"{means[r.method][j]:.1e} / {np.median(r.curves[i, k]):.0e}"
                for j, (i, k) in enumerate((i, k) for i in (0, 1) for k in KS)
            ]
            cells = [f"**{cell}**" if means[r.method][j] <= 1.1 * least[j] else cell for j, cell in enumerate(cells)]
            parts.append("| " + " | ".join([r.method, *cells]) + " |")
    if record["tuned"]:
        words = (f"{name}: {', '.join(f'{k} {v:g}' for k, v in at.items())}" for name, at in record["tuned"].items())
        parts += [
            "",
            f"Tuned on {TUNING_INSTANCES} other instances of the first set, at k = {TUNED_AT}: {'; '.join(words)}.",
        ]
    return "\n".join([*parts, ""])


def picture(results: Sequence[Result]) -> str:
    """Mean gap at y against the iteration, a panel a set."""
    sets = list(dict.fromkeys(result.instances for result in results))
    figure = drawing._figure(4.6 * len(sets), 4.4)
    axes = np.atleast_1d(figure.subplots(1, len(sets)))
    for axis, name in zip(axes, sets, strict=True):
        here = [result for result in results if result.instances == name]
        for number, result in enumerate(here):
            style = {**drawing.STYLES[number % len(drawing.STYLES)], "marker": ""}
            if number >= len(drawing.STYLES):
                style["alpha"] = 0.5
            mean = np.where(np.isfinite(result.curves[0]), result.curves[0], np.nan).mean(1)
            axis.plot(np.arange(len(mean)), mean, label=result.method, **style)
        axis.set_xscale("symlog", linthresh=10)
        axis.set_yscale("log")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("iteration", fontsize=9)
        axis.grid(True, linewidth=0.4, alpha=0.5)
    axes[0].set_ylabel("mean relative gap at y", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return drawing.svg(figure, "relative gap against iteration")
