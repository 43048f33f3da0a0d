"""Coordinate check of the maximal-update parametrisation: does what training changes depend on the width?

    python benchmarks/coordinate_check.py [--plot docs/coordinate-check.png] [--seeds 3]

An MLP 64-width-width-10 trains for ten steps at widths 64 to 1,024, base width 64. What is shown is the root mean
square change of each layer's pre-activations, under lopt.mup and under the standard parametrisation, with µLO (a random
but fixed theta), Adam and SGD. Flat lines are right. tests/test_mup.py asserts the slopes. Half a minute of CPU time.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt import mup, rules

WIDTHS, BASE = (64, 128, 256, 512, 1024), 64
INPUTS, CLASSES, BATCH, STEPS = 64, 10, 64, 10
LAYERS = ("layer 1", "layer 2", "output")
OPTIMIZERS = {"mulo": 1.0, "adam": 0.003, "sgd": 0.03}  # learning rate at the base width


def shapes(width: int) -> dict[str, jax.ShapeDtypeStruct]:
    sizes = (INPUTS, width, width, CLASSES)
    return {f"w{i}": jax.ShapeDtypeStruct(sizes[i : i + 2], jnp.float32) for i in range(3)}


def transform(optimizer: str, multipliers: Any) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose step of each tensor is multiplied by a factor."""
    lr = OPTIMIZERS[optimizer]
    if optimizer == "mulo":
        rule = rules.make("mulo", hidden=8)
        return rule.bind(rule.init_theta(jax.random.key(0)), lr=lr, multipliers=multipliers, diagnostics=False)
    plain = optax.adam(lr) if optimizer == "adam" else optax.sgd(lr)
    scale = optax.stateless(lambda updates, params: jax.tree.map(jnp.multiply, updates, multipliers))
    return optax.with_extra_args_support(optax.chain(plain, scale))


# Compiling is most of the time: with fewer passes it is half as long.
@functools.partial(jax.jit, static_argnames="optimizer", compiler_options={"xla_backend_optimization_level": 0})
def change(
    params: dict[str, jax.Array], x: jax.Array, labels: jax.Array, forward: Any, multipliers: Any, *, optimizer: str
) -> jax.Array:
    """[3] root mean square change of each layer's pre-activations over the steps, all on one batch.

    Args:
      params: w0 [64, width], w1 [width, width], w2 [width, 10].
      x: [B, 64].
      labels: [B].
      forward: () multiplies the output.
      multipliers: of each tensor's step.
    """

    def activations(p):
        first = x @ p["w0"]
        second = jax.nn.relu(first) @ p["w1"]
        return first, second, forward * (jax.nn.relu(second) @ p["w2"])

    def loss(p):
        return optax.softmax_cross_entropy_with_integer_labels(activations(p)[-1], labels).mean()

    tx = transform(optimizer, multipliers)

    def step(carry, _):
        p, state = carry
        updates, state = tx.update(jax.grad(loss)(p), state, p)
        return (optax.apply_updates(p, updates), state), None

    (trained, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=STEPS)
    pairs = zip(activations(trained), activations(params), strict=True)
    return jnp.stack([jnp.sqrt(jnp.mean((after - before) ** 2)) for after, before in pairs])


def changes(optimizer: str, parametrisation: str, *, seeds: int, widths: Sequence[int] = WIDTHS) -> np.ndarray:
    """[widths, 3] changes by `change`, geometric means over seeds. Parametrisation: "muP" or "standard"."""
    rows = []
    for width in widths:
        base, target = shapes(BASE), shapes(width)
        std, forward, factors = {k: s.shape[0] ** -0.5 for k, s in target.items()}, 1.0, dict.fromkeys(target, 1.0)
        if parametrisation == "muP":
            about = mup.describe(base, target)
            std = {k: s.shape[0] ** -0.5 * about[k].init for k, s in base.items()} | {"w2": 0.0}
            forward, factors = about["w2"].forward, mup.multipliers(base, target, optimizer)
        found = []
        for seed in range(seeds):
            rng = np.random.default_rng(seed)  # not in the graph: it would be most of the compile time
            labels = rng.integers(CLASSES, size=BATCH)
            x = rng.normal(size=(CLASSES, INPUTS))[labels] + rng.normal(size=(BATCH, INPUTS))
            params = {k: np.float32(std[k] * rng.normal(size=s.shape)) for k, s in target.items()}
            found.append(np.log(change(params, np.float32(x), labels, forward, factors, optimizer=optimizer)))
        rows.append(np.exp(np.mean(found, axis=0)))
    return np.stack(rows)


def slopes(values: np.ndarray) -> np.ndarray:
    """[3] slopes of log2 change against log2 width."""
    return np.polyfit(np.log2(WIDTHS), np.log2(values), 1)[0]


def plot(path: str, seeds: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(OPTIMIZERS), figsize=(10, 6), sharex=True, sharey="col", layout="constrained")
    names = {"mulo": "µLO, random theta", "adam": "Adam", "sgd": "SGD"}
    for row, parametrisation in enumerate(("muP", "standard")):
        for column, optimizer in enumerate(OPTIMIZERS):
            values, axis = changes(optimizer, parametrisation, seeds=seeds), axes[row, column]
            for layer, line, slope in zip(LAYERS, values.T, slopes(values), strict=True):
                axis.loglog(WIDTHS, line, marker="o", label=f"{layer}: slope {slope:+.2f}")
            print(f"{optimizer:5} {parametrisation:9} slopes {np.round(slopes(values), 3)}")
            axis.set_title(f"{names[optimizer]}, {parametrisation}", fontsize=10)
            axis.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8, frameon=False)
    figure.supxlabel("width")
    figure.supylabel(f"RMS change of pre-activations after {STEPS} steps")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", default="docs/coordinate-check.png")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    plot(arguments.plot, arguments.seeds)
