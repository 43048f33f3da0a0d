"""Nowcasts in numbers: memory, parity with the reference's recordings, and steps on two small tasks.

    python benchmarks/nowcast.py memory                 # XLA's memory analysis at 1 M and 10 M parameters, two minutes
    python benchmarks/nowcast.py parity --shared DIR    # every recorded prediction, two minutes
    python benchmarks/nowcast.py compare --shared DIR   # the released weights against Adam and lines, some minutes
    python benchmarks/nowcast.py choose                 # upd_scale of our networks, on the tasks of validation
    python benchmarks/nowcast.py heldout --shared DIR   # ours and the released ones on held-out tasks, half an hour

DIR holds parity/nino and weights/nino; `heldout` runs without it too, and then without the released weights.
docs/nowcast.md and checkpoints/nino-small/README.md have the tables.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the package meta_train before the benchmark of its name

import tasks
from lopt import nowcast

STEPS, PERIOD, EVERY, SEEDS = 5000, 1000, 50, 3
GNN_SCALE, WNN_SCALE = 1.0, 1.0  # of the shipped networks, by `choose`
RATES = (1e-3, 3e-3, 1e-2)
FACTORS = (0.1, 0.25, 0.5)
TASKS = {
    "MLP-32, mnist5k": ("image_mlp", {"data": "mnist5k", "hidden": (32,)}),
    "autoencoder, digits": ("autoencoder", {"data": "digits"}),
}


def shape(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def mlp(width: int) -> dict[str, Any]:
    return {f"Dense_{i}": {"kernel": shape(width, width), "bias": shape(width)} for i in range(3)}


def transformer(width: int, depth: int, vocabulary: int) -> dict[str, Any]:
    norm, heads = {"scale": shape(width), "bias": shape(width)}, (4, width // 4)
    attention = {name: {"kernel": shape(width, *heads)} for name in ("query", "key", "value")}
    attention["out"] = {"kernel": shape(*heads, width)}
    up, down = {"kernel": shape(width, 4 * width)}, {"kernel": shape(4 * width, width)}
    block = {"ln_1": norm, "attn": attention, "ln_2": norm, "mlp": {"fc1": up, "fc2": down}}
    stack = {str(i): block for i in range(depth)}
    return {"wte": {"embedding": shape(vocabulary, width)}, "h": stack, "ln_f": norm}


def memory() -> None:
    """Temporary memory of a whole update, state donated: what nowcasts need beyond the five states and the params."""
    networks = {"MLP": mlp(576), "MLP, 10 M": mlp(1826), "transformer": transformer(320, 6, 8000)}
    network = nowcast.make("gnn", jax.random.key(0))
    print("| parameters | of | with the guard, B/parameter | without | state, B/parameter |\n|--:|---|--:|--:|--:|")
    for name, params in networks.items():
        size, cells = sum(math.prod(x.shape) for x in jax.tree.leaves(params)), []
        graph = nowcast.recognise(params)
        for guard in (True, False):
            loss_fn = (lambda p: sum(jnp.sum(x * x) for x in jax.tree.leaves(p))) if guard else None
            tx = nowcast.nino(
                optax.sgd(1e-3), network=network, graph=graph, max_steps=10_000, guard=guard, loss_fn=loss_fn
            )

            def step(params: Any, grads: Any, state: Any, tx: Any = tx) -> Any:
                updates, state = tx.update(grads, state, params)
                return optax.apply_updates(params, updates), state

            state = jax.eval_shape(tx.init, params)
            compiled = jax.jit(step, donate_argnums=(0, 2)).lower(params, params, state).compile()
            cells.append(f"{compiled.memory_analysis().temp_size_in_bytes / size:.1f}")  # type: ignore[union-attr]
        held = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state)) / size
        print(f"| {size:,} | {name} | {cells[0]} | {cells[1]} | {held:.1f} |", flush=True)


def parity(shared: Path) -> None:
    import nino

    print("| recorded | network | horizons | largest difference |\n|---|---|---|--:|")
    for case in nino.CASES:
        with np.load(shared / f"parity/nino/{case}.npz") as z:
            recorded = dict(z)
        for weights in nino.WEIGHTS:
            network = nowcast.read(shared / f"weights/nino/{weights}.npz")
            at = nino.horizons(recorded, weights)
            got = nino.predictions(network, recorded, at, positions=recorded["pos"])
            wanted = np.stack([recorded[f"pred_{weights}_k{k}"] for k in at])
            horizons = ", ".join(map(str, at))
            print(f"| {case} | {weights} | {horizons} | {np.abs(got - wanted).max():.1e} |", flush=True)
    for weights in ("nino_no_posw", "nino_mlp_h32"):
        ours, theirs = nino.loop(shared, weights)
        print(f"| loop of 30 calls | {weights} | 40, 13, 1 | {np.abs(ours - theirs).max():.1e} |", flush=True)


def curve(task: Any, make: Callable[[Any, Any], Any], seed: int, split: str = "test") -> tuple[np.ndarray, Any]:
    """Loss of a split every EVERY steps of one run, and its last state. make: `(params, loss_fn) -> transform`."""
    key = jax.random.key(seed)
    phi = task.sample(jax.random.fold_in(key, 0))
    params = task.init(jax.random.fold_in(key, 1), phi)
    # The guard sees one batch of validation data; rates and factors are chosen by others, the table is of test data.
    fresh = task.batch(jax.random.fold_in(key, 2), phi, task.data, "validation")
    final = [task.batch(jax.random.fold_in(key, 10 + n), phi, task.data, split) for n in range(8)]
    tx = make(params, lambda p: task.loss(p, key, phi, fresh))

    def step(carry: Any, i: jax.Array) -> Any:
        params, state = carry
        batch = task.batch(jax.random.fold_in(key, 1000 + i), phi, task.data, "train")
        value, grads = jax.value_and_grad(task.loss)(params, key, phi, batch)
        updates, state = tx.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params: Any) -> Any:
        def piece(carry: Any, start: jax.Array) -> Any:
            carry, _ = jax.lax.scan(step, carry, start + jnp.arange(EVERY))
            return carry, sum(task.loss(carry[0], key, phi, b) for b in final) / len(final)

        return jax.lax.scan(piece, (params, tx.init(params)), jnp.arange(0, STEPS, EVERY))

    (_, state), losses = run(params)
    return np.asarray(losses), state


def compare(shared: Path) -> None:
    gnn, wnn = (nowcast.read(shared / f"weights/nino/{w}.npz") for w in ("nino_no_posw", "nino_mlp"))
    patient = dict(slack=0.2, probe=150)
    how = dict(max_steps=STEPS, period=PERIOD)

    def adam(lr: float) -> Callable[..., Any]:
        return lambda params, loss_fn: optax.with_extra_args_support(optax.adam(lr))

    for name, (family, settings) in TASKS.items():
        task = tasks.make(family, **settings)

        def chosen(make: Callable[..., Any], task: Any = task) -> float:
            return float(np.nan_to_num(curve(task, make, 100, "validation")[0].min(), nan=np.inf))

        best = min(RATES, key=lambda lr: chosen(adam(lr)))
        base = lambda best=best: optax.adam(best)  # noqa: E731

        def line(factor: float, base: Any = base) -> Callable[..., Any]:
            return lambda params, loss_fn: nowcast.linefit(base(), factor=factor, guard=False, **how)

        factor = min(FACTORS, key=lambda f: chosen(line(f)))
        rows: dict[str, Callable[..., Any]] = {
            f"Adam, tuned ({best:g})": adam(best),
            f"Linefit, factor tuned ({factor:g})": line(factor),
            "Linefit, guard": lambda p, f, b=base, k=factor: nowcast.linefit(b(), factor=k, loss_fn=f, **how),
            "WNN+, released": lambda p, f, b=base: nowcast.wnn(b(), network=wnn, guard=False, **how),
            "WNN+, guard that waits": lambda p, f, b=base: nowcast.wnn(b(), network=wnn, loss_fn=f, **patient, **how),
            "NiNo, released": lambda p, f, b=base: nowcast.nino(b(), network=gnn, graph=None, guard=False, **how),
            "NiNo, released, guard": lambda p, f, b=base: nowcast.nino(b(), network=gnn, graph=None, loss_fn=f, **how),
        }
        waits = lambda p, f, b=base: nowcast.nino(b(), network=gnn, graph=None, loss_fn=f, **patient, **how)  # noqa: E731
        rows["NiNo, guard that waits"] = waits
        print(f"\n| {name} | steps to Adam's lowest loss | last loss | lowest loss | nowcasts applied, restored |")
        print("|---|--:|--:|--:|---|")
        targets: list[float] = []
        for label, make in rows.items():
            runs = [curve(task, make, seed) for seed in range(SEEDS)]
            losses = np.stack([losses for losses, _ in runs])
            targets = targets or [float(x.min()) for x in losses]
            hit = [np.flatnonzero(x <= t) for x, t in zip(losses, targets, strict=True)]
            steps = ", ".join(f"{EVERY * (h[0] + 1):,}" if h.size else "never" for h in hit)
            told = [getattr(state, "counts", None) for _, state in runs]
            seen = "; ".join(f"{int(c.applied)}, {int(c.restored)}" for c in told if c is not None) or "–"
            last, low = losses[:, -1], losses.min(1)
            spread = f"{last.mean():.4f} ± {last.std():.4f} | {low.mean():.4f} ± {low.std():.4f}"
            print(f"| {label} | {steps} | {spread} | {seen} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "parity", "compare", "choose", "heldout"))
    parser.add_argument("--shared", type=Path, help="folder of parity/nino and weights/nino")
    add = parser.add_argument_group("heldout").add_argument
    add("--out", type=Path, default=Path("runs/nowcast-heldout"), help="folder of what is done, to go on from")
    add("--gnn", default="nino-small", help="name or folder of weights")
    add("--wnn", default="wnn-small", help="the same")
    add("--gnn-scale", type=float, default=GNN_SCALE, help="upd_scale; the default is what `choose` said")
    add("--wnn-scale", type=float, default=WNN_SCALE, help="the same")
    add("--only", nargs="+", default=[], help="parts of names of tasks")
    add("--rows", nargs="+", default=[], help="methods, as the table names them; Adam always; default: all")
    add("--plot", type=Path, help="picture to write of the tasks of --only, of what was run, in place of the tables")
    args = parser.parse_args()
    if args.what in ("parity", "compare") and args.shared is None:
        parser.error(f"{args.what} needs --shared")
    if args.what in ("choose", "heldout"):
        import nowcast_heldout as H

        scales = {"nino": args.gnn_scale, "wnn": args.wnn_scale}
        if args.what == "choose":
            H.choose(args.out, args.gnn, args.wnn)
            return
        if not args.plot:
            H.heldout(args.shared, args.out, args.gnn, args.wnn, args.only, args.rows, scales)
        else:
            names = [name for name in H.TASKS if any(word in name for word in args.only)]
            H.plot(args.out, args.gnn, args.wnn, args.plot, names, scales)
        return
    {"memory": memory, "parity": lambda: parity(args.shared), "compare": lambda: compare(args.shared)}[args.what]()


if __name__ == "__main__":
    main()
