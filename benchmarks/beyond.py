"""A learned optimizer where it was not meta-trained: a transformer of 1.3 M parameters, bfloat16, wrong labels.

    python benchmarks/beyond.py [--cases transformer,bf16,noise] [--optimizer lopt-base] [--seeds 2]

Untuned, beside AdamW on a cosine with the best of several learning rates (and of weight decays 0 and .1, but for the
transformer), chosen on seed 0 by the final validation loss. Data that shipped optimizers never met:

- transformer: 4 blocks of width 160 on python_source, 8 windows of 64 characters a step, 2,000 steps.
- bf16: the MLP 64-64 on Fashion-MNIST at 8×8 with parameters, gradients and updates in bfloat16, and the same in
  float32; 1,000 steps.
- noise: the same MLP with 20 and 40 % of the training labels wrong; 1,000 steps (bf16 has it without).

Prints a table in Markdown: final validation loss, mean and range over seeds. About forty minutes on two cores, nearly
all of them the transformer's.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from directions import adamw, shipped  # beside this file

import tasks
from meta_test import metrics, runs

MLP = {"data": "fashion10k", "size": 8, "hidden": (64, 64)}
LM = {"data": "python_source", "depth": 4, "width": 160, "heads": 4, "length": 64, "batch_size": 8}


def in_bf16(task: tasks.Task) -> tasks.Task:
    """The task with parameters, and so gradients, in bfloat16."""

    def init(key: jax.Array, phi: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), task.init(key, phi))

    return task._replace(init=init)


def noisy(share: float) -> tasks.Task:
    return tasks.make("image_mlp", **MLP, augment=[["noise_labels", {"share": share}]] if share else [])


CASES = {
    "transformer": {"transformer of 1.3 M, 2,000 steps": lambda: tasks.make("transformer_lm", **LM)},
    "bf16": {
        "MLP, float32": lambda: noisy(0.0),
        "MLP, bfloat16": lambda: in_bf16(noisy(0.0)),
    },
    "noise": {f"MLP, {share:.0%} of labels wrong": lambda share=share: noisy(share) for share in (0.2, 0.4)},
}


def finals(contender: runs.Contender, task: tasks.Task, hyper: Any, seeds: Any, num_steps: int) -> np.ndarray:
    """Last smoothed validation loss of each run; infinite where it diverged."""
    steps = runs.eval_steps(num_steps)[-metrics.WINDOW :]
    program = runs.prepare(contender, task, len(seeds))
    curves = runs.run(program, hyper, np.asarray(seeds), steps, (), lambda n: None)
    found = metrics.final(curves.losses["validation"])
    return np.where(np.isfinite(found), found, np.inf)


def words(found: np.ndarray) -> str:
    return f"{found.mean():.4g} ({found.min():.4g} to {found.max():.4g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--optimizer", default="lopt-base", help="name or folder of an artifact")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    seeds = np.arange(args.seeds)
    print(f"| task | {args.optimizer}, untuned | AdamW | chosen for it |\n|---|--:|--:|--:|", flush=True)
    for case in args.cases.split(","):
        large = case == "transformer"
        num_steps = 2000 if large else 1000
        rates = np.array([1e-3, 3e-3, 1e-2]) if large else 10 ** np.linspace(-3, -1, 9)
        decays = np.array([0.1]) if large else np.array([0.0, 0.1])
        grid = {
            "size": np.repeat(rates, len(decays)).astype(np.float32),
            "decay": np.tile(decays, len(rates)).astype(np.float32),
        }
        for label, make in CASES[case].items():
            task = make()
            found = finals(adamw(num_steps), task, grid, np.zeros(len(grid["size"]), int), num_steps)
            best = {name: np.repeat(values[found.argmin()], args.seeds) for name, values in grid.items()}
            theirs = finals(adamw(num_steps), task, best, seeds, num_steps)
            ours = finals(shipped(args.optimizer, num_steps), task, {}, seeds, num_steps)
            chosen = f"lr {best['size'][0]:.2g}, decay {best['decay'][0]:g}, of {len(found)}"
            print(f"| {label} | {words(ours)} | {words(theirs)} | {chosen} |", flush=True)
            jax.clear_caches()
    print(f"{args.seeds} seeds, JAX {jax.__version__}", file=sys.stderr)


if __name__ == "__main__":
    main()
