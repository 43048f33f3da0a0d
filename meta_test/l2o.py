"""Composite convex problems: relative gaps to certified optima, of learned rules and classical methods.

Instances of a set are drawn anew, in float64, by the seed; all methods start at 0. A gap is (F - F*) / F*, floored at
1e-12, at the point y where the gradient is taken and at the last output x of the proximal operator. What a classical
method has to tune (momentum, rate, ADMM's step) is tuned on other instances of each set, by its mean gap at each k of
TUNED_AT; constants of Lipschitz are the true ones.
"""

from __future__ import annotations

import argparse
import csv
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from lopt.base import unknown
from meta_test import drawing
from meta_test.l2o_methods import NEAR, Method, at_edge, classical, curves, learned, tune, unrolled
from meta_test.l2o_problems import FLOOR, PROBLEMS, Instances, Problem, Set, draw, home
from meta_test.report import dump, machine, write

if TYPE_CHECKING:
    from jaxtyping import Float

KS = (10, 50, 100, 1000)
TUNING_INSTANCES, TUNING_SEED = 64, 1
DRAWN = 60  # points of a curve at most
TOP = 1e3  # of the picture: what diverges leaves it
FILES = ("l2o.json", "l2o.md", "l2o.csv", "l2o.svg")


class Result(NamedTuple):
    """Of a method on a set."""

    method: str
    instances: str
    tuned: str  # in words, "" where nothing is
    at: tuple[int, ...]  # iterations
    curves: Float[np.ndarray, "2 K N"]  # gaps at y and x by iteration


def iterations() -> tuple[int, ...]:
    """Those of the table and of the curves: all of the first ten, then ever sparser."""
    sparse = np.geomspace(10, KS[-1], DRAWN).round().astype(int)
    return tuple(sorted({k for k in (*range(10), *(int(k) for k in sparse), *KS) if k <= KS[-1]}))


def compare(
    problem: Problem, methods: Mapping[str, Method], sets: Sequence[str], args: argparse.Namespace
) -> tuple[list[Result], dict[str, Instances]]:
    """Every method on every set."""
    results, drawn, at = [], {}, iterations()
    for name in sets:
        began = time.process_time()
        count = min(args.instances, problem.sets[name].most)
        task, instances = draw(problem, name, count, args.seed, args.cache)
        others = draw(problem, name, min(count, TUNING_INSTANCES), TUNING_SEED + args.seed, args.cache)[1]
        drawn[name] = instances
        for label, method in methods.items():
            if not method.fits(instances.phi):
                continue
            chosen = tune(task, method, others, 1 if problem.constrained else 0)
            for tuned in {tuple(values.items()): values for values in chosen.values()}.values():
                ks = " and ".join(str(k) for k, values in chosen.items() if values == tuned)
                edge = ", an end of its grid" if at_edge(method, tuned) else ""
                words = ", ".join(f"{key} {value:g}{edge}" for key, value in tuned.items())
                found = curves(task, method, instances, at, **tuned)
                results.append(Result(f"{label}, tuned for {ks}" if tuned else label, name, words, at, found))
            jax.clear_caches()
        print(f"{name}: {count} instances, {time.process_time() - began:.0f} s of CPU", flush=True)
    return results, drawn


def l2o(args: argparse.Namespace) -> int:
    """The command."""
    problem = PROBLEMS[args.problem]
    if args.table:
        if args.problem != "logistic":
            raise ValueError(
                f"lopt-eval l2o: --table, got {args.table} with {args.problem}; valid: --problem logistic."
            )
        own = Set({"data": args.table}, 64, "tasks.logistic_l1:table")
        problem = problem._replace(sets={**problem.sets, Path(args.table).name: own})
    sets = [name.strip() for name in args.sets.split(";") if name.strip()] or list(problem.sets)
    for name in sets:
        if name not in problem.sets:
            raise unknown("lopt-eval l2o", "set", name, problem.sets)
    args.cache = args.cache or home()
    with jax.enable_x64(True):
        methods: dict[str, Method] = {}
        for source in (one for one in args.optimizers.split(",") if one):
            methods |= learned(source, problem.steps, args.far)
        wanted = [word.strip() for word in args.rows.split(";") if word.strip()]
        if not wanted or any("LISTA" in word for word in wanted):  # which would be trained first
            methods |= unrolled(problem, sets, args.cache)
        methods |= classical(problem)
        kept = {name: method for name, method in methods.items() if not wanted or any(word in name for word in wanted)}
        if not kept:
            raise unknown("lopt-eval l2o", "row", args.rows, methods)
        results, drawn = compare(problem, kept, sets, args)
    record = {
        "command": args.written,
        "machine": machine(),
        "sets": {name: {"instances": len(one.best), "certified_to": one.gap} for name, one in drawn.items()},
        "constrained": problem.constrained,
        "tuned": [[result.instances, result.method, result.tuned] for result in results if result.tuned],
        "safeguard_steps": problem.steps,
        "far": args.far,
        "rows": rows(results),
    }
    page = as_markdown(record, results)
    contents = (dump(record), page, as_csv(results), picture(results, 1 if problem.constrained else 0))
    write(args.out, dict(zip(FILES, contents, strict=True)))
    print(page)
    print(f"written to {args.out}: {', '.join(FILES)}")
    return 0


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One a set, method, point and k: count of instances, mean, half of the 95 % interval, median; None: infinite."""
    out = []
    for result in results:
        for point, held in zip(("y", "x"), result.curves, strict=True):
            for k in KS:
                one = summary(held[result.at.index(k)])
                finite = {key: value if np.isfinite(value) else None for key, value in one._asdict().items()}
                out.append({"set": result.instances, "method": result.method, "at": point, "k": k, **finite})
    return out


class Summary(NamedTuple):
    count: int  # of instances
    mean: float
    half: float  # of the mean's 95 % interval, a normal one
    median: float


def summary(gaps: Float[np.ndarray, " N"]) -> Summary:
    """Of the instances that were run."""
    gaps = gaps[~np.isnan(gaps)]
    with np.errstate(invalid="ignore", over="ignore"):
        half = 1.96 * gaps.std(ddof=1) / len(gaps) ** 0.5 if len(gaps) > 1 else np.inf
    return Summary(len(gaps), float(gaps.mean()), float(half), float(np.median(gaps)))


def as_csv(results: Sequence[Result]) -> str:
    out = io.StringIO()
    found = rows(results)
    writer = csv.DictWriter(out, [*found[0]], lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return out.getvalue()


def as_markdown(record: Mapping[str, Any], results: Sequence[Result]) -> str:
    """A table a set; the least mean of all its instances at each k in bold, all within a tenth of it too."""
    parts = [
        "# Relative gaps (F - F*) / F*",
        "",
        f"Mean ± half of its 95 % interval / median over instances, floored at {FLOOR:g}; made by "
        f"`{record['command']}`. Numbers of fewer instances than the others of a table say so, and are not compared: "
        f"learned rules without the safeguard are run on the first {record['far']} alone beyond k = {NEAR:,}. With it "
        f"they hand over after {record['safeguard_steps']} steps at the latest.",
    ]
    for name, about in record["sets"].items():
        here = [result for result in results if result.instances == name]
        points = [("x", 1)] if record["constrained"] else [("y", 0), ("x", 1)]
        held = {r.method: [summary(r.curves[i, r.at.index(k)]) for _, i in points for k in KS] for r in here}
        whole = about["instances"]
        means = [[one.mean if one.count == whole else np.inf for one in cells] for cells in held.values()]
        least = np.min(means, axis=0)
        head = ["method", *(f"{point}, k = {k}" for point, _ in points for k in KS)]
        parts += [
            "",
            f"## {name}",
            f"{about['instances']} instances, optima certified to {about['certified_to']:.1e}.",
            "",
            "| " + " | ".join(head) + " |",
            "|:--" + "|--:" * (len(head) - 1) + "|",
        ]
        for method, numbers in held.items():
            cells = [
                words if one.count == whole else f"{words} ({one.count} instances)"
                for one, words in ((one, f"{one.mean:.1e} ± {one.half:.0e} / {one.median:.0e}") for one in numbers)
            ]
            cells = [
                f"**{cell}**" if one.count == whole and one.mean <= 1.1 * low else cell
                for cell, one, low in zip(cells, numbers, least, strict=True)
            ]
            parts.append("| " + " | ".join([method, *cells]) + " |")
        words = [f"{method}: {tuned}" for instances, method, tuned in record["tuned"] if instances == name]
        if words:
            parts += ["", f"Tuned on {min(whole, TUNING_INSTANCES)} other instances of this set: {'; '.join(words)}."]
    return "\n".join([*parts, ""])


def picture(results: Sequence[Result], point: int = 0) -> str:
    """Mean gap at y, or at x (1), against the iteration, a panel a set."""
    sets = list(dict.fromkeys(result.instances for result in results))
    figure = drawing._figure(4.6 * len(sets), 4.4)
    axes = np.atleast_1d(figure.subplots(1, len(sets)))
    for axis, name in zip(axes, sets, strict=True):
        here = [result for result in results if result.instances == name]
        for number, result in enumerate(here):
            style = {**drawing.STYLES[number % len(drawing.STYLES)], "marker": ""}
            if number >= len(drawing.STYLES):
                style["alpha"] = 0.5
            mean = np.array([summary(gaps).mean for gaps in result.curves[point]])
            mean[~(mean < TOP)] = np.nan
            axis.plot(result.at, mean, label=result.method, **style)
        axis.set_xscale("symlog", linthresh=10)
        axis.set_yscale("log")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("iteration", fontsize=9)
        axis.grid(True, linewidth=0.4, alpha=0.5)
    axes[0].set_ylabel(f"mean relative gap at {'yx'[point]}", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return drawing.svg(figure, "relative gap against iteration")
