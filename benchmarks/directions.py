"""Which direction, set by hand and of which length, a learned rule should start from: validation losses.

    python benchmarks/directions.py [--tasks mlp,gru] [--seeds 2] [--directions lengths]
    python benchmarks/directions.py --artifacts lopt-base,docs/recipes/i0   # artifacts, untuned, instead

The rule `tiny` with its networks at 0 and some inputs passed on, at relative step sizes that are the same for all
tasks; beside it AdamW over learning rates (no weight decay). All with the cosine schedule. `--directions plain`: one
input, m or m·rsqrt(v), decays .9 or .99, orthogonalised or not. `--directions lengths`: m + m·rsqrt(v) orthogonalised,
and then one after the other some gradient, a least size of matrices by their fan-in and .2 of vectors, and decay. Tasks
like those of `mini` on data that is not held out. Prints a table in Markdown: of each direction the mean final
validation loss over seeds at each step, over AdamW's at its best rate of each task. About fifteen minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lopt
import tasks
from lopt import pretrained
from lopt.rules import tiny as tiny_rule
from lopt.rules.tiny import GRADIENTS, HAND_SET, MOMENTUM
from meta_test import runs

TASKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "mlp": ("image_mlp", {"data": "mnist5k", "size": 8, "hidden": (64, 64)}, 600),
    "autoencoder": ("autoencoder", {"data": "mnist5k", "size": 8, "hidden": (64,), "code": 8}, 600),
    "cnn": ("cnn", {"data": "mnist5k", "size": 8, "channels": (8, 16), "batch_size": 32}, 400),
    "gru": ("rnn_lm", {"data": "kjv", "width": 32, "embedding": 16, "length": 16, "batch_size": 16}, 400),
    "transformer": ("transformer_lm", {"data": "kjv", "depth": 1, "width": 32, "length": 16, "batch_size": 16}, 400),
}
BOTH = {HAND_SET: 1.0, MOMENTUM: 1.0}
NESTEROV = {**BOTH, **dict.fromkeys(GRADIENTS, tiny_rule.NESTEROV)}
SIZED = {"fan_in": 1.0, "min_rms": 0.2, "pace": 1}  # decay needs a pace, which is 0 here
DIRECTIONS: dict[str, dict[str, tuple[dict[str, Any], dict[int, float]]]] = {  # name -> settings, inputs passed on
    "plain": {
        "m·rsqrt(v), .9": ({}, {HAND_SET: 1.0}),
        "orthogonal m·rsqrt(v), .9": ({"newton_schulz": True}, {HAND_SET: 1.0}),
        "orthogonal m, .9": ({"newton_schulz": True}, {MOMENTUM: 1.0}),
        "orthogonal m, .99": ({"newton_schulz": True}, {MOMENTUM + 1: 1.0}),
    },
    "lengths": {
        "orthogonal m + m·rsqrt(v)": ({"newton_schulz": True}, BOTH),
        "… with some gradient": ({"newton_schulz": True}, NESTEROV),
        "… and least sizes": ({"newton_schulz": True, **SIZED}, NESTEROV),
        "… and decay .1": ({"newton_schulz": True, **SIZED, "decay": 0.1}, NESTEROV),
        "… and decay .2": ({"newton_schulz": True, **SIZED, "decay": 0.2}, NESTEROV),
    },
}
STEPS = 10 ** np.linspace(-2.75, -1, 8)  # of a tensor, over its own size
RATES = 10 ** np.linspace(-3, -1, 9)  # of AdamW


def by_hand(settings: Mapping[str, Any], passed: Mapping[int, float], num_steps: int) -> runs.Contender:
    """The rule with networks of zeros and some inputs passed on."""
    rule = tiny_rule.tiny(**settings, step_mult=1.0)
    zeros = jax.tree.map(jnp.zeros_like, rule.init_theta(jax.random.key(0)))
    theta = zeros._replace(skip=zeros.skip.at[jnp.array(list(passed))].set(jnp.array(list(passed.values()))))

    def make(theta: Any, size: Any) -> optax.GradientTransformation:
        return rule.bind(theta._replace(log_step=jnp.log(size)), num_steps=num_steps)

    return runs.Contender("by hand", make, theta)


def shipped(artifact: str, num_steps: int) -> runs.Contender:
    """An artifact as it is; `size` is a factor of its steps."""
    rule, theta = pretrained.read(artifact)

    def make(theta: Any, size: Any = 1.0) -> optax.GradientTransformation:
        return rule.bind(theta, num_steps=num_steps, lr=size)

    return runs.Contender(artifact, make, theta, eval_params=lopt.eval_params)


def adamw(num_steps: int) -> runs.Contender:
    """On a cosine from the learning rate `size`."""

    def make(_: Any, size: Any, decay: Any = 0.0) -> optax.GradientTransformation:
        return optax.adamw(lambda t: size * 0.5 * (1 + jnp.cos(jnp.pi * t / num_steps)), weight_decay=decay)

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
    parser.add_argument("--directions", choices=DIRECTIONS, default="plain")
    parser.add_argument("--artifacts", default="")
    args = parser.parse_args()
    artifacts = args.artifacts.split(",") if args.artifacts else []
    sizes = np.ones(1) if artifacts else STEPS
    print("| task | direction | " + " | ".join("loss" if artifacts else f"{x:.3f}" for x in sizes) + " |")
    print("|---|---|" + "--:|" * len(sizes))
    for name in args.tasks.split(","):
        family, given, num_steps = TASKS[name]
        task = tasks.make(family, **given)
        found = losses(adamw(num_steps), task, RATES, num_steps, args.seeds)
        best = found.min()
        print(f"| {name} | AdamW: {best:.4f} at {RATES[found.argmin()]:.3f} |" + " |" * len(sizes), flush=True)
        rows = {artifact: shipped(artifact, num_steps) for artifact in artifacts} or {
            direction: by_hand(settings, passed, num_steps)
            for direction, (settings, passed) in DIRECTIONS[args.directions].items()
        }
        for direction, contender in rows.items():
            ratio = losses(contender, task, sizes, num_steps, args.seeds) / best
            print(f"| | {direction} | " + " | ".join(f"{x:.3f}" if x < 10 else ">10" for x in ratio) + " |", flush=True)
            jax.clear_caches()
    print(f"{args.seeds} seeds, JAX {jax.__version__}", file=sys.stderr)


if __name__ == "__main__":
    main()
