"""What each family of tasks costs, and what tuned Adam makes of it.

    python benchmarks/families.py                   # the table of docs/tasks.md and docs/tasks.png; minutes of one core
    python benchmarks/families.py --only vit,pinn   # prints these rows and writes nothing
    rm -r runs/families                             # where measured rows are kept, so that what was stopped goes on
    python benchmarks/families.py --keep-times      # the same, but a row of the page with these defaults keeps its time

Every family at its factory's defaults. A step is a training batch, its gradient and Adam's update, on one core, the
best of five timings. FLOPs are counted in the traced gradient: two a multiply-add of a matrix product, one an element
of the result of any other operation. Adam's learning rate is the best of nine by the final validation loss; the least
or the largest of them is marked as the grid's edge. Run what is timed on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before JAX counts the cores

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tasks
from meta_test.cost import flops
from tasks import Task

ROOT = Path(__file__).parents[1]
RATES = tuple(float(f"{10**x:.1g}") for x in np.linspace(-4, 0, 9))
STEPS, EVALS, REPEATS = 1000, 40, 5
BEGIN, END = "<!-- benchmarks/families.py -->\n", "<!-- end -->\n"


class Row(NamedTuple):
    """What is known of a family."""

    family: str
    task: Task
    parameters: int
    flops: int  # of a gradient
    microseconds: float  # a step
    rate: float  # of tuned Adam
    losses: np.ndarray  # [EVALS + 1, 2] of tuned Adam, training and validation


def gradient(task: Task, params: Any, key: jax.Array, phi: Any, data: Any) -> tuple[jax.Array, Any]:
    batch_key, loss_key = jax.random.split(key)
    batch = task.batch(batch_key, phi, data, "train")
    return (task.value_and_grad or jax.value_and_grad(task.loss))(params, loss_key, phi, batch)


def begin(task: Task, seed: int) -> tuple[Any, Any]:
    """phi and params."""
    phi_key, init_key = jax.random.split(jax.random.key(seed))
    phi = jax.jit(task.sample)(phi_key)
    return phi, jax.jit(task.init)(init_key, phi)


def curves(task: Task, rates: Any, *, steps: int = STEPS, evals: int = EVALS, seed: int = 0) -> np.ndarray:
    """[rates, evals + 1, 2] training and validation losses of Adam, side by side on the same task and batches."""
    phi, params = begin(task, seed)

    def judge(params: Any, data: Any) -> jax.Array:
        def mean(split: tasks.Split) -> jax.Array:
            keys = jax.random.split(jax.random.key(1), 8)
            if task.eval_batches is None:
                batches = jax.lax.map(lambda key: task.batch(key, phi, data, split), keys)
            else:
                batches = task.eval_batches(phi, data, split)
            return jnp.mean(jax.lax.map(lambda batch: task.loss(params, keys[0], phi, batch), batches))

        return jnp.stack([mean("train"), mean("validation")])

    @jax.jit
    def run(rates: jax.Array, data: Any) -> jax.Array:
        def one(rate: jax.Array) -> jax.Array:
            adam = optax.adam(rate)

            def step(t: jax.Array, carry: Any) -> Any:
                params, state, grad_state = carry
                grads = gradient(task, params, jax.random.fold_in(jax.random.key(seed + 1), t), phi, data)[1]
                if task.grad_transform:
                    grads, grad_state = task.grad_transform.update(grads, grad_state, params)
                updates, state = adam.update(grads, state)
                return optax.apply_updates(params, updates), state, grad_state

            def period(carry: Any, index: jax.Array) -> tuple[Any, jax.Array]:
                every = steps // evals
                carry = jax.lax.fori_loop(index * every, (index + 1) * every, step, carry)
                return carry, judge(carry[0], data)

            state = params, adam.init(params), task.grad_transform.init(params) if task.grad_transform else ()
            return jnp.concatenate([judge(params, data)[None], jax.lax.scan(period, state, jnp.arange(evals))[1]])

        return jax.vmap(one)(rates)

    return np.asarray(run(jnp.asarray(rates), task.data))


def best(losses: np.ndarray) -> int:
    """The rate whose final validation loss is least; what is not finite is not."""
    return int(np.argmin(np.nan_to_num(losses[:, -1, 1], nan=np.inf)))


def microseconds(task: Task) -> float:
    """A step's time, the best of REPEATS."""
    phi, params = begin(task, 0)
    adam = optax.adam(1e-4)

    @jax.jit
    def run(params: Any, state: Any, data: Any, steps: jax.Array) -> Any:
        def step(t: jax.Array, carry: Any) -> Any:
            params, state = carry
            updates, state = adam.update(gradient(task, params, jax.random.key(t), phi, data)[1], state)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, steps, step, (params, state))

    def seconds(steps: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(run(params, adam.init(params), task.data, steps))
        return time.perf_counter() - began

    seconds(1)
    steps = max(10, min(20_000, int(0.3 / max(seconds(10) / 10, 1e-6))))
    return min(seconds(steps) for _ in range(REPEATS)) / steps * 1e6


def kept(page: str) -> dict[tuple[str, str], float]:
    """(family, defaults) -> microseconds, of the rows of a page."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    return {(row[0], row[1]): float(row[4].replace(",", "")) for row in cells if len(row) == 7}


def defaults(task: Task) -> str:
    return task.name.partition("(")[2].rpartition(")")[0]


def measure(family: str, times: Mapping[tuple[str, str], float]) -> Row:
    task = tasks.make(family)
    phi, params = begin(task, 0)
    traced = jax.make_jaxpr(lambda *arguments: gradient(task, *arguments))(params, jax.random.key(0), phi, task.data)
    found = curves(task, RATES)
    chosen = best(found)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    took = times.get((f"`{family}`", defaults(task)))
    took = microseconds(task) if took is None else took
    return Row(family, task, parameters, flops(traced.jaxpr), took, RATES[chosen], found[chosen])


def once(family: str, times: Mapping[tuple[str, str], float], path: Path) -> Row:
    """The row in a file, if that is of the factory's defaults; or else it is measured and written there."""
    if path.is_file():
        with np.load(path) as held:
            task = tasks.make(family)
            if str(held["name"]) == f"{task.name} v{task.version}":
                numbers = int(held["parameters"]), int(held["flops"]), float(held["microseconds"]), float(held["rate"])
                return Row(family, task, *numbers, held["losses"])
    row = measure(family, times)
    fields = {name: value for name, value in row._asdict().items() if name not in ("family", "task")}
    np.savez(path, name=f"{row.task.name} v{row.task.version}", **fields)
    return row


def rate(row: Row) -> str:
    """Adam's, and whether a better one may lie outside the grid."""
    return f"{row.rate:g}{' (edge)' if row.rate in (RATES[0], RATES[-1]) else ''}"


def table(rows: list[Row]) -> str:
    head = "| family | defaults | parameters | FLOPs a gradient | µs a step | Adam's rate | validation loss |\n"
    lines = [
        f"| `{row.family}` | {defaults(row.task)} | {row.parameters:,} | "
        f"{row.flops:,} | {row.microseconds:,.0f} | {rate(row)} | {row.losses[0, 1]:.3g} → {row.losses[-1, 1]:.3g} |"
        for row in rows
    ]
    return head + "|---|---|--:|--:|--:|--:|--:|\n" + "\n".join(lines) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 5
    lines = -(-len(rows) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(14, 2.4 * lines), layout="constrained", squeeze=False)
    steps = np.linspace(0, STEPS, EVALS + 1)
    for axis, row in zip(axes.flat, rows, strict=False):
        for losses, label in zip(row.losses.T, ("training", "validation"), strict=True):
            axis.plot(steps, losses, label=label, linewidth=1.2)
        axis.set_yscale("log")
        axis.set_title(f"{row.family}, Adam at {rate(row)}", fontsize=9)
        axis.tick_params(labelsize=7, which="both")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(rows) :]:
        axis.axis("off")
    axes[0, 0].legend(fontsize=8, frameon=False)
    figure.supxlabel("step")
    figure.supylabel("loss")
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="families, by commas; prints their rows")
    parser.add_argument("--keep-times", action="store_true", help="of rows of the page that have the same defaults")
    parser.add_argument("--rows", type=Path, default=ROOT / "runs/families", help="where measured rows are; to go on")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where tasks.md and tasks.png are")
    arguments = parser.parse_args()
    rows, page = [], arguments.docs / "tasks.md"
    times = kept(page.read_text()) if arguments.keep_times else {}
    arguments.rows.mkdir(parents=True, exist_ok=True)
    for family in arguments.only.split(",") if arguments.only else sorted(tasks.REGISTRY):
        rows.append(once(family, times, arguments.rows / f"{family}.npz"))
        print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    if arguments.only:
        print(table(rows), end="")
        return
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(before + BEGIN + table(rows) + END + rest.partition(END)[2])
    plot(rows, arguments.docs / "tasks.png")


if __name__ == "__main__":
    main()
