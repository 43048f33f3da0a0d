"""Bias and variance of the six estimators, and the influence-balancing problem: the picture of docs/estimators.md.

    python benchmarks/estimators.py [--out docs/estimators.png]

Two minutes on two idle cores. Both problems have linear inner dynamics and a closed-form meta-gradient; seeds are fixed
below.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

# A neighbour of this file has the name of a package of ours, and Python puts its folder first.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import jax
import jax.numpy as jnp
import numpy as np
import optax

from meta_train.estimators import REGISTRY, WHOLE_EPISODES
from meta_train.inner import Inner

HORIZON, TRUNCATIONS = 48, (1, 2, 4, 8, 12, 16, 24, 48)
THETA, STD, RUNS, WINDOWS = jnp.array([0.3, -0.2]), 0.1, 256, 96
STYLE = {
    "full_es": ("tab:purple", "--", "s"),
    "truncated_es": ("tab:orange", "-", "^"),
    "pes": ("tab:blue", "-", "o"),
    "nres": ("tab:green", "-", "D"),
    "truncated_backprop": ("tab:red", "-", "v"),
    "full_backprop": ("black", "--", "x"),
}


def staggered(reset, horizon: int):
    """Like `reset`, but the first episode is cut short."""

    def first(key):
        reset_key, clock_key = jax.random.split(key)
        return reset(reset_key) | {"t": jax.random.randint(clock_key, (), 0, horizon)}

    return first


def linear(horizon: int = HORIZON) -> Inner:
    """x ← .9 x + theta . (1, cos t) from x ~ N(0, ¼), meta-loss ½ (x - 1)²."""

    def reset(key):
        return {"x": 0.5 * jax.random.normal(key), "t": jnp.zeros((), jnp.int32)}

    def step(theta, particle, key):
        x = 0.9 * particle["x"] + theta[0] + theta[1] * jnp.cos(1.0 * particle["t"])
        t = particle["t"] + 1
        return {"x": x, "t": t}, 0.5 * (x - 1) ** 2, t >= horizon, ~jnp.isfinite(x)

    return Inner(reset, step, {"x": 0, "t": None}, horizon, horizon, staggered(reset, horizon))


def linear_gradient(horizon: int = HORIZON) -> np.ndarray:
    """Of the mean meta-loss. The random init has mean 0 and no influence on it."""
    x, dx, total = 0.0, np.zeros(2), np.zeros(2)
    for t in range(horizon):
        drive = np.array([1.0, np.cos(t)])
        x, dx = 0.9 * x + np.asarray(THETA) @ drive, 0.9 * dx + drive
        total += (x - 1) * dx
    return total / horizon


def influence(horizon: int = 200) -> Inner:
    """s ← A s + theta (1 × 10, -1 × 13), meta-loss ½ (s_1 - 1)², from s = 1; A has ½ on and above its diagonal.

    Source: Tallec and Ollivier (2017), arXiv:1702.05043; as in Vicol et al. (2021), arXiv:2112.13835.
    """
    matrix, signs = _influence_system()

    def reset(key):
        return {"s": jnp.ones(23), "t": jnp.zeros((), jnp.int32)}

    def step(theta, particle, key):
        s = jnp.asarray(matrix, jnp.float32) @ particle["s"] + theta * jnp.asarray(signs, jnp.float32)
        t = particle["t"] + 1
        return {"s": s, "t": t}, 0.5 * (s[0] - 1) ** 2, t >= horizon, ~jnp.isfinite(s).all()

    return Inner(reset, step, {"s": 0, "t": None}, horizon, horizon, staggered(reset, horizon))


def _influence_system() -> tuple[np.ndarray, np.ndarray]:
    return 0.5 * np.eye(23) + 0.5 * np.eye(23, k=1), np.array([1.0] * 10 + [-1.0] * 13)


def influence_gradient(theta: float, horizon: int = 200, truncation: int | None = None) -> float:
    """Of the mean meta-loss; with a truncation (that divides the horizon) without what came before a step's window."""
    matrix, signs = _influence_system()
    s, ds, total = np.ones(23), np.zeros(23), 0.0
    for t in range(horizon):
        if truncation and t % truncation == 0:
            ds = np.zeros(23)
        s, ds = matrix @ s + theta * signs, matrix @ ds + signs
        total += (s[0] - 1) * ds[0]
    return total / horizon


def make(name: str, inner: Inner, truncation: int, count: int):
    factory = getattr(importlib.import_module(REGISTRY[name]), name)
    settings = {"particles": count} if "backprop" in name else {"pairs": count, "std": STD}
    return factory(inner, **settings, **({} if name in WHOLE_EPISODES else {"truncation": truncation}))


def measure(name: str, truncation: int) -> tuple[float, float, float, float]:
    """Relative bias, its standard error, relative standard deviation of one estimate of one pair, its inner steps."""
    estimator, truth = make(name, linear(), truncation, 1), linear_gradient()
    past = -(-HORIZON // truncation)  # windows until all have begun an episode of full length

    @jax.jit
    @jax.vmap
    def run(key):
        def window(state, k):
            estimate, state = estimator.estimate(jax.random.fold_in(key, k), THETA, state)
            return state, estimate.grad

        return jax.lax.scan(window, estimator.init(key, THETA), jnp.arange(past + max(WINDOWS, past)))[1][past:]

    grads = np.asarray(run(jax.random.split(jax.random.key(0), RUNS)), np.float64)  # [runs, windows, 2]
    each, scale = grads.mean(1), np.linalg.norm(truth)
    bias = np.linalg.norm(each.mean(0) - truth) / scale
    error = np.sqrt((each.var(0, ddof=1) / RUNS).sum()) / scale
    spread = np.sqrt(grads.reshape(-1, 2).var(0).sum()) / scale
    return bias, error, spread, estimator.inner_steps


def descend(name: str, truncation: int, *, steps: int = 600, lr: float = 3e-4, count: int = 100) -> np.ndarray:
    """Theta over meta-steps of plain gradient descent from ½ on the influence-balancing problem."""
    estimator, tx = make(name, influence(), truncation, count), optax.sgd(lr)

    @jax.jit
    def run(key):
        def meta_step(carry, k):
            theta, state = carry
            estimate, state = estimator.estimate(jax.random.fold_in(key, k), theta, state)
            updates, _ = tx.update(estimate.grad, tx.init(theta))
            return (optax.apply_updates(theta, updates), state), theta

        theta = jnp.array(0.5)
        return jax.lax.scan(meta_step, (theta, estimator.init(key, theta)), jnp.arange(steps))[1]

    return np.asarray(run(jax.random.key(0)))


def best_theta() -> float:
    """Where the influence-balancing gradient, affine in theta, is 0."""
    at0, at1 = influence_gradient(0.0), influence_gradient(1.0)
    return -at0 / (at1 - at0)


DESCENTS = [
    ("truncated_backprop", 1),
    ("truncated_backprop", 10),
    ("truncated_es", 10),
    ("pes", 10),
    ("nres", 10),
    ("full_es", 200),
    ("full_backprop", 200),
]


def draw(rows: dict, descents: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    titles = (
        "bias",
        "standard deviation of one estimate of one pair",
        "the same at equal cost (more pairs instead of longer windows)",
    )
    labels = ("|mean - truth| / |truth|", "std / |truth|", f"std / |truth| × √(inner steps / {HORIZON})")
    for axis, title, label in zip(axes.flat, titles, labels, strict=False):
        axis.set(title=title, ylabel=label, xlabel=f"truncation K (horizon {HORIZON})", xscale="log", yscale="log")
        axis.set_xticks(TRUNCATIONS, [str(k) for k in TRUNCATIONS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for name, values in rows.items():
        color, line, marker = STYLE[name]
        style = dict(color=color, ls=line, marker=marker, ms=5, lw=1.5)
        bias, _, spread, steps = np.array(values).T
        ks = np.array(TRUNCATIONS)
        axes[0, 0].plot(ks, np.maximum(bias, 1e-6), **style, label=name)
        axes[0, 1].plot(ks, spread, **style)
        axes[1, 0].plot(ks, spread * np.sqrt(steps / HORIZON), **style)
    noisy = [np.array(values)[:, 1] for name, values in rows.items() if name in ("pes", "nres", "full_es")]
    floor = np.max(noisy, axis=0)
    axes[0, 0].fill_between(TRUNCATIONS, 4 * floor, 1e-5, color="grey", alpha=0.15, label="within 4 standard errors")
    axes[0, 0].set_ylim(5e-5, 2)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=7, fontsize=9)
    axis = axes[1, 1]
    for i, ((name, k), thetas) in enumerate(descents.items()):
        color, line, marker = STYLE[name]
        line = ":" if (name, k) == ("truncated_backprop", 1) else line
        label = name if name in WHOLE_EPISODES else f"{name}, K = {k}"
        # Several coincide: their markers take turns.
        axis.plot(thetas, color=color, ls=line, marker=marker, markevery=(12 * i, 84), lw=1.2, ms=5, label=label)
    axis.axhline(best_theta(), color="grey", lw=5, alpha=0.3, zorder=0, label="optimum")
    axis.set(title="influence balancing (horizon 200)", xlabel="meta-step", ylabel="theta", ylim=(-0.25, 1.9))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/estimators.png", help="the picture")
    arguments = parser.parse_args()
    print("| estimator | K | bias / truth | ± standard error | std of a pair / truth | inner steps |")
    print("|---|--:|--:|--:|--:|--:|")
    rows: dict[str, list] = {name: [] for name in STYLE}
    for name in STYLE:
        for k in TRUNCATIONS:
            whole = name in WHOLE_EPISODES
            if not (whole and rows[name]):  # no truncation: the same at every K
                rows[name].append(measure(name, k))
                bias, error, spread, steps = rows[name][-1]
                shown = "-" if whole else k
                print(f"| {name} | {shown} | {bias:.4f} | {error:.4f} | {spread:.2f} | {steps} |", flush=True)
            else:
                rows[name].append(rows[name][0])
    descents = {(name, k): descend(name, k) for name, k in DESCENTS}
    print(
        f"\ninfluence balancing: optimum {best_theta():.4f}; theta after {len(descents['pes', 10])} meta-steps from 0.5"
    )
    for (name, k), thetas in descents.items():
        print(f"  {name} K {k}: {thetas[-1]:.4f}")
    draw(rows, descents, arguments.out)


if __name__ == "__main__":
    main()
