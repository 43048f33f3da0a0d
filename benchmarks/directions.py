"""Which direction, set by hand and of which length, a learned rule should start from: validation losses.

    python benchmarks/directions.py [--tasks mlp,gru] [--seeds 2]

The rule `tiny` with its network at 0 and one input passed on (m or m·rsqrt(v), decays .9 or .99), orthogonalised or
not, at relative step sizes that are the same for all tasks; beside it AdamW over learning rates (no weight decay). All
with the cosine schedule. Tasks like those of `mini` on data that is not held out. Prints a table in Markdown: of each
direction the mean final validation loss over seeds at each step, over AdamW's at its best rate of each task. About
fifteen minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tasks
from lopt.rules.tiny import HAND_SET, MOMENTUM, tiny
from meta_test import runs

TASKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "mlp": ("image_mlp", {"data": "mnist5k", "size": 8, "hidden": (64, 64)}, 600),
    "autoencoder": ("autoencoder", {"data": "mnist5k", "size": 8, "hidden": (64,), "code": 8}, 600),
    "cnn": ("cnn", {"data": "mnist5k", "size": 8, "channels": (8, 16), "batch_size": 32}, 400),
    "gru": ("rnn_lm", {"data": "kjv", "width": 32, "embedding": 16, "length": 16, "batch_size": 16}, 400),
    "transformer": ("transformer_lm", {"data": "kjv", "depth": 1, "width": 32, "length": 16, "batch_size": 16}, 400),
}
DIRECTIONS = {  # name -> orthogonalised, which input of the rule is passed on
    "m·rsqrt(v), .9": (False, HAND_SET),
    "orthogonal m·rsqrt(v), .9": (True, HAND_SET),
    "orthogonal m, .9": (True, MOMENTUM),
    "orthogonal m, .99": (True, MOMENTUM + 1),
}
STEPS = 10 ** np.linspace(-2.75, -1, 8)  # of a tensor, over its own root mean square
RATES = 10 ** np.linspace(-3, -1, 9)  # of AdamW


def by_hand(orthogonal: bool, input_: int, num_steps: int) -> runs.Contender:
    """The rule with a network of zeros and one input passed on."""
    rule = tiny(newton_schulz=orthogonal, step_mult=1.0)
    zeros = jax.tree.map(jnp.zeros_like, rule.init_theta(jax.random.key(0)))
    theta = zeros._replace(skip=zeros.skip.at[input_].set(1.0))

    def make(theta: Any, size: Any) -> optax.GradientTransformation:
        return rule.bind(theta._replace(log_step=jnp.log(size)), num_steps=num_steps)

    return runs.Contender("by hand", make, theta)


def adamw(num_steps: int) -> runs.Contender:
    def make(_: Any, size: Any) -> optax.GradientTransformation:
        return optax.adamw(lambda t: size * 0.5 * (1 + jnp.cos(jnp.pi * t / num_steps)), weight_decay=0.0)

    return runs.Contender("adamw", make)


def losses(contender: runs.Contender, task: tasks.Task, sizes: np.ndarray, num_steps: int, seeds: int) -> np.ndarray:
    """[sizes] Mean final validation loss; infinite where a seed diverged."""
    program = runs.prepare(contender, task, len(sizes) * seeds)
    hyper = {"size": np.tile(sizes, seeds).astype(np.float32)}
    curves = runs.run(
        program, hyper, np.repeat(np.arange(seeds), len(sizes)), np.array([0, num_steps]), (), lambda n: None
    )
    found = curves.losses["validation"][:, -1].reshape(seeds, -1).mean(0)
    return np.where(np.isfinite(found), found, math.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    print("| task | direction | " + " | ".join(f"{x:.3f}" for x in STEPS) + " |")
    print("|---|---|" + "--:|" * len(STEPS))
    for name in args.tasks.split(","):
        family, settings, num_steps = TASKS[name]
        task = tasks.make(family, **settings)
        found = losses(adamw(num_steps), task, RATES, num_steps, args.seeds)
        best = found.min()
        print(f"| {name} | AdamW: {best:.4f} at {RATES[found.argmin()]:.3f} |" + " |" * len(STEPS), flush=True)
        for direction, (orthogonal, input_) in DIRECTIONS.items():
            ratio = losses(by_hand(orthogonal, input_, num_steps), task, STEPS, num_steps, args.seeds) / best
            print(f"| | {direction} | " + " | ".join(f"{x:.2f}" if x < 10 else ">10" for x in ratio) + " |", flush=True)
            jax.clear_caches()
    print(f"{args.seeds} seeds, JAX {jax.__version__}", file=sys.stderr)


if __name__ == "__main__":
    main()
