"""What bfloat16 accumulators do to the loss that an optimizer ends with.

    python benchmarks/low_precision_state.py [--steps 500] [--seeds 3] [--json FILE]

The shipped weights `quickstart`, untuned, on five tasks; the same seeds with accumulators in float32, in bfloat16
rounded stochastically (what `accumulators="bfloat16"` does), and, as a control, in bfloat16 rounded to the nearest.
Loss over the fixed evaluation batches, mean ± standard deviation over seeds. About six minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lopt
import tasks
from lopt import precision

TASKS: dict[str, dict[str, Any]] = {
    "digits MLP-32": dict(family="image_mlp", data="digits", hidden=(32,)),
    "mnist5k MLP-128": dict(family="image_mlp", data="mnist5k", size=28, hidden=(128,)),
    "mnist5k CNN": dict(family="cnn", data="mnist5k"),
    "breast_cancer MLP": dict(family="tabular_mlp"),
    "autoencoder": dict(family="autoencoder"),
}
VARIANTS = ("float32", "bfloat16", "nearest")


def final_losses(task: tasks.Task, variant: str, steps: int, seeds: int) -> dict[str, np.ndarray]:
    """[seeds] of training and validation loss."""
    accumulators = "float32" if variant == "float32" else "bfloat16"
    tx = lopt.load("quickstart", num_steps=steps, accumulators=accumulators)

    def run(key: jax.Array, data: Any) -> dict[str, jax.Array]:
        phi_key, init_key, key = jax.random.split(key, 3)
        phi = task.sample(phi_key)
        params = task.init(init_key, phi)

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            batch_key, loss_key = jax.random.split(key)
            batch = task.batch(batch_key, phi, data, "train")
            loss, grads = jax.value_and_grad(task.loss)(params, loss_key, phi, batch)
            updates, state = tx.update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, steps))

        def mean(split: tasks.Split) -> jax.Array:
            assert task.eval_batches is not None
            batches = task.eval_batches(phi, data, split)
            return jnp.mean(jax.lax.map(lambda batch: task.loss(params, key, phi, batch), batches))

        return {split: mean(split) for split in ("train", "validation")}

    keys = jax.random.split(jax.random.key(0), seeds)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(run, in_axes=(0, None)))(keys, task.data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--json", metavar="FILE", help="write the losses there too")
    options = parser.parse_args()
    stochastic = precision.narrow
    rows: dict[str, Any] = {}
    print("| task | loss | float32 | bfloat16, stochastic | bfloat16, nearest |\n|---|---|--:|--:|--:|")
    for name in options.tasks:
        task, found = tasks.make(**TASKS[name]), {}
        for variant in VARIANTS:
            precision.narrow = (lambda new, old, noise: new) if variant == "nearest" else stochastic
            found[variant] = final_losses(task, variant, options.steps, options.seeds)
        precision.narrow = stochastic
        for split in ("train", "validation"):
            losses = {variant: found[variant][split] for variant in VARIANTS}
            cells = [f"{x.mean():.4g} ± {x.std(ddof=1):.2g}" for x in losses.values()]
            print(f"| {name} | {split} | " + " | ".join(cells) + " |", flush=True)
            rows[f"{name}, {split}"] = {variant: x.tolist() for variant, x in losses.items()}
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
