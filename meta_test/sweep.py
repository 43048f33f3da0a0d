"""Final loss against width, depth, horizon or batch size, for one family.

Baselines are tuned by the grid at the first value and keep what was chosen: what the maximal-update parametrisation
promises is that this still is good at the last (Yang et al., 2022, arXiv:2203.03466); learned optimizers are known to
fail far from where they were trained (Metz et al., 2022, arXiv:2211.09760). Learned rules run untuned everywhere.

With `--mup` every optimizer is run a second time under that parametrisation: the task scales its init and outputs from
the first width (`mup_base`), and `lopt.mup.multipliers` multiply each tensor's update, by the rule that is its own
(`RULES`). An optimizer that neither rule is about is refused.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import numpy as np
import optax

import lopt
import tasks
from lopt import mup
from meta_test import drawing, metrics, tuning
from meta_test.cells import Cell, rounded
from meta_test.commands import entrants
from meta_test.entrants import Entrant
from meta_test.report import machine, write
from meta_test.runs import eval_steps
from meta_test.suites import DEPTH, WIDTH, Problem

if TYPE_CHECKING:
    from jaxtyping import Float

    from tasks.base import Task

VALUES: dict[str, tuple[int, ...]] = {
    "width": (32, 64, 128, 256, 512),
    "depth": (1, 2, 4, 6, 8),
    "horizon": (250, 500, 1000, 2500, 5000),
    "batch": (16, 32, 64, 128, 256),
}
# Who follows which rule of `lopt.mup`: updates linear in the gradient, and updates whose elements are of the size of
# the learning rate whatever the sizes of gradient and tensor (but for eps).
RULES: dict[Literal["sgd", "adam"], tuple[str, ...]] = {
    "sgd": ("sgd", "momentum", "nesterov"),
    "adam": (
        *("adabelief", "adam", "adam_atan2", "adamax", "adamp", "adamw", "ademamix", "adopt", "amsgrad"),
        *("cautious_adamw", "cautious_lion", "laprop", "lion", "nadamw", "signum"),
    ),
}
FINDS_ITS_STEP = ("cocob", "dadapt_adamw", "dog", "dowg", "lbfgs", "mechanic", "momo", "momo_adam", "prodigy", "swats")
FILES = ("sweep.json", "sweep.md", "sweep.csv", "sweep.svg")


class Line(NamedTuple):
    """An optimizer over the values of the axis."""

    name: str
    chosen: str  # in words
    finals: Float[np.ndarray, "V S"]  # last smoothed validation loss; infinite where it diverged or was not run
    error: str = ""  # what ended it, if it crashed or was skipped


def settings_at(family: str, axis: str, value: int) -> dict[str, Any]:
    """Settings of a family at a value of an axis, others at their defaults. Raises ValueError without such an axis."""
    factory = tasks._factory(family)
    valid = inspect.signature(factory).parameters
    if axis == "horizon":
        return {}
    if axis == "batch" and "batch_size" in valid:
        return {"batch_size": value}
    if axis in ("width", "depth"):
        if axis in valid:
            return {axis: value}
        for name in ("hidden", "channels"):
            if name in valid:
                return {name: (value,) * DEPTH if axis == "width" else (WIDTH,) * value}
    raise ValueError(f"lopt-eval sweep: {family} has no {axis}; valid: another --family or --axis.")


def problems(family: str, axis: str, values: Sequence[int], num_steps: int) -> list[Problem]:
    """One a value."""
    return [
        Problem(
            family,
            settings_at(family, axis, value),
            value if axis == "horizon" else num_steps,
            f"{axis} {value}",
            f"{axis}-{value}",
        )
        for value in values
    ]


def in_mup(axis: str, todo: Sequence[Problem]) -> list[Problem]:
    """The same problems under the maximal-update parametrisation whose base is the first one's width.

    Raises ValueError for another axis than width, and for a family without `mup_base`.
    """
    family = todo[0].family
    if axis != "width" or "mup_base" not in inspect.signature(tasks._factory(family)).parameters:
        raise ValueError(
            f"lopt-eval sweep: --mup, got --axis {axis} of {family}; valid: --axis width of a family with mup_base, "
            "e.g. image_mlp, transformer_lm."
        )
    (base,) = todo[0].settings.values()
    return [one._replace(settings={**one.settings, "mup_base": base}) for one in todo]


def rule_of(entrant: Entrant) -> Literal["mulo", "adam", "sgd"]:
    """The rule of `lopt.mup.multipliers` that an optimizer follows.

    Raises ValueError for one that averages its parameters or finds its step itself, where factors of the update would
    not be factors of the learning rate, and for one that no rule is known to be about: steps in proportion to a
    tensor's own size (LAMB, LARS, Adafactor, hand_celo2), whole matrices made orthogonal or whitened (Muon, SOAP,
    Shampoo), what is neither linear in the gradient nor free of its scale (AdaGrad, RAdam), and code of one's own.
    """
    if entrant.artifact:
        return "mulo"
    for rule, names in RULES.items():
        if entrant.name in names:
            return rule
    if entrant.known and entrant.contender.eval_params is not None:
        why = "it is evaluated at averages of its own, which factors of the update do not reach"
    elif entrant.name in FINDS_ITS_STEP:
        why = "it finds the size of its step itself, and takes the factors into account"
    else:
        why = "lopt.mup has no rule for its updates"
    valid = ", ".join(sorted(name for names in RULES.values() for name in names))
    raise ValueError(f"lopt-eval sweep: --mup, got {entrant.name}: {why}; valid: learned optimizers, {valid}.")


def _multiplied(entrant: Entrant, base: Task, target: Task) -> Entrant:
    """Each tensor's update is multiplied as the parametrisation has it for this optimizer, see `rule_of`."""
    key = jax.random.key(0)
    shapes, wide = (jax.eval_shape(lambda task=task: task.init(key, task.sample(key))) for task in (base, target))
    factors = mup.multipliers(shapes, wide, rule_of(entrant))
    if entrant.artifact:
        rule, _ = lopt.read(entrant.artifact)

        def bound(theta: Any, *, num_steps: Any, cosine: Any) -> Any:
            return rule.bind(theta, num_steps=num_steps, multipliers=factors)

        return entrant._replace(contender=entrant.contender._replace(make=bound))
    plain = entrant.contender.make

    def scale(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda update, factor: factor * update, updates, factors)

    def make(*args: Any, **kwargs: Any) -> Any:
        return optax.chain(plain(*args, **kwargs), optax.stateless(scale))

    return entrant._replace(contender=entrant.contender._replace(make=make))


def lines(todo: Sequence[Problem], who: Sequence[Entrant], seeds: int, say: Callable[[str], None]) -> list[Line]:
    """Tune at the first problem, then run everywhere. What crashes is told, and the others go on."""
    scaled = "mup_base" in todo[0].settings
    made = [tasks.make(problem.family, **problem.settings) for problem in todo]
    out = []
    for entrant in who:
        name = f"{entrant.name}, muP" if scaled else entrant.name
        if scaled and rule_of(entrant) == "sgd":  # its factors grow with the width, and would multiply the decay
            space = {key: one for key, one in entrant.space.items() if key != "weight_decay"}
            entrant = entrant._replace(space=space)
        finals, chosen, error = np.full((len(todo), seeds), np.inf), "untuned", ""
        if lacks := next(filter(None, map(entrant.lacks, made)), ""):
            error = f"skipped: needs {lacks}"
        try:
            point = tuning.Point({}, "constant")
            if entrant.tuned and not error:
                bench = tuning.Bench(entrant, made[0], lambda updates: None)
                found = tuning.search(bench, Cell(todo[0], entrant.name, "grid", 1))
                point = found.points[tuning.choose(found, "validation")]
                chosen = point.describe()
            for at, (problem, task) in enumerate(zip(todo, made, strict=True) if not error else ()):
                say(f"{name}, {problem.note}")
                here = _multiplied(entrant, made[0], task) if scaled else entrant
                bench = tuning.Bench(here, task, lambda updates: None)
                steps = eval_steps(problem.num_steps)[-metrics.WINDOW :]
                curves = bench.run([point], range(seeds), problem.num_steps, steps, ())
                finals[at] = metrics.final(curves.losses["validation"])[0]
        except Exception as e:  # of a user's optimizer, or of the compiler
            error = f"crashed: {type(e).__name__}: {e}"[:200]
        if error:
            say(f"{name}: {error}")
        jax.clear_caches()
        out.append(Line(name, chosen, finals, error))
    return out


def parse(axis: str, text: str) -> tuple[int, ...]:
    """Values of --values. Raises ValueError."""
    if not text:
        return VALUES[axis]
    try:
        values = tuple(int(word) for word in text.split(","))
    except ValueError:
        values = ()
    least = 10 if axis == "horizon" else 1
    if len(values) < 2 or min(values) < least or len(set(values)) < len(values):
        raise ValueError(f"lopt-eval sweep: --values, got {text!r}; valid: 2 or more different integers >= {least}.")
    return values


def sweep(args: argparse.Namespace) -> int:
    """The command."""
    values = parse(args.axis, args.values)
    todo, who = problems(args.family, args.axis, values, args.steps), entrants(args.optimizers)
    found, parametrisations = [], [todo, in_mup(args.axis, todo)] if args.mup else [todo]
    for entrant in who if args.mup else ():
        rule_of(entrant)  # before anything is run
    for these in parametrisations:
        found += lines(these, who, args.seeds, lambda text: print(text, flush=True))
    record = {
        "command": args.written,
        "machine": machine(),
        "axis": args.axis,
        "values": values,
        "problems": [problem._asdict() for problem in todo],
        "lines": [{**line._asdict(), "finals": rounded(line.finals)} for line in found],
    }
    drawn = {line.name: line.finals for line in found if np.isfinite(line.finals).any()}
    figure = drawing.sweep_plot(args.axis, values, drawn)
    contents = (json.dumps(record, indent=1) + "\n", as_markdown(record, found), as_csv(values, found), figure)
    write(args.out, dict(zip(FILES, contents, strict=True)))
    print(as_markdown(record, found))
    print(f"written to {args.out}: {', '.join(FILES)}")
    return 0


def _text(losses: np.ndarray, error: str) -> str:
    if np.isfinite(losses).all():
        return f"{losses.mean():.4g}"
    return error.split(":")[0] if error and not np.isfinite(losses).any() else "diverged"


def as_markdown(record: Mapping[str, Any], found: Sequence[Line]) -> str:
    """A table of means over seeds."""
    values, first = record["values"], record["problems"][0]
    head = ["optimizer", *(f"{record['axis']} {value}" for value in values), f"tuned at {values[0]}"]
    rows = [[line.name, *(_text(one, line.error) for one in line.finals), line.chosen] for line in found]
    table = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    table.insert(1, "|:--" + "|--:" * len(values) + "|:--|")
    notes = [line for one in found if one.error for line in (f"{one.name}: {one.error}".replace("\n", " "), "")]
    title = f"Final validation loss of {first['family']} against {record['axis']}"
    return "\n".join([f"# {title}", "", *table, "", *notes, f"Made by `{record['command']}`.", ""])


def as_csv(values: Sequence[int], found: Sequence[Line]) -> str:
    """One line an optimizer, value and seed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["optimizer", "value", "seed", "final_validation_loss"])
    for line in found:
        for value, losses in zip(values, line.finals, strict=True):
            writer.writerows([line.name, value, seed, f"{loss:.6g}"] for seed, loss in enumerate(losses))
    return out.getvalue()
