"""Inner steps per second of meta-training, how they scale, what a start takes, and what the floor is.

    python benchmarks/meta_train.py [--only speed scaling devices startup floor velo l2o] [--json FILE]

The setting is small_fc h 4 on an MLP 64-32-10, batch 64, PES truncation 50, horizons 100 to 2,000, meta-loss of the
training batch. An inner step is one inner update of one antithetic sign. In that setting google/learned_optimization
does about 2,700 a CPU-second with one core busy, so that this is its wall-clock speed too.

- speed: 8 to 64 pairs on all cores, median over meta-steps.
- scaling: microseconds an inner step against pairs, truncation and params; where cost is linear they do not grow.
- devices: the same pairs over 1 and over 2 host devices.
- startup: from the call of `lopt-train quickstart --compare ''` to the first line of its record, with an empty
  compilation cache and with the one that left.
- floor: on one device with one thread, what batches, forward and backward, and the rule take alone, and FLOPs counted
  by hand over the measured rate of a matrix product.
- velo: inner steps per second of the rule `velo`, for the arithmetic of docs/scaling.md.
- l2o: the meta-step of the config l2o_lasso, backpropagation through 20 steps of 64 instances of 20 × 40.

Each measurement is a process of its own. All take about ten minutes on two cores. Run it on an idle machine, then
`python benchmarks/tables.py FILE` writes the tables of docs/performance.md and docs/scaling.md; nothing else publishes
these numbers.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# This file has the name of a package of ours, and Python puts its folder first.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]

REFERENCE = 2700.0  # inner steps per second, and per CPU-second, of google/learned_optimization on such a machine
SECTIONS = ("speed", "scaling", "devices", "startup", "floor", "velo", "l2o")
BATCH, WIDTHS = 64, (64, 32, 10)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(
    *, pairs: int = 8, truncation: int = 50, hidden: int = 32, rule: str = "small_fc", meta_steps: int = 40
) -> dict[str, Any]:
    """Of one program, after two meta-steps to warm up."""
    from meta_train import config as cfg
    from meta_train.groups import make_tasks, param_shapes

    run = cfg.Run(
        name="benchmark",
        rule=rule,
        groups=(cfg.Group("image_mlp", {"data": ["digits", "mnist5k"], "size": 8, "hidden": [hidden]}),),
        estimator=cfg.Estimator(pairs=pairs, std=0.01, truncation=truncation),
        horizon=cfg.Horizon(max(100, truncation), 2000),
        meta_loss="train",
    )
    params = sum(x[0] * (x[1] if len(x) > 1 else 1) for x in param_shapes(*make_tasks(run, run.groups)).values())
    return {"pairs": pairs, "truncation": truncation, "params": params} | timed(run, meta_steps)


def l2o(*, meta_steps: int = 40) -> dict[str, Any]:
    """Of the config l2o_lasso, without its meta-validation."""
    from meta_train import config as cfg
    from meta_train.configs.l2o_lasso import RUN

    sizes = {"pairs": RUN.estimator.pairs, "truncation": RUN.estimator.truncation, "params": 40}
    return sizes | timed(dataclasses.replace(RUN, validation=cfg.Validation()), meta_steps)


def timed(run: Any, meta_steps: int) -> dict[str, Any]:
    """Speed of a run's meta-steps."""
    import jax

    from meta_train import loop

    program = loop.build(run)
    state = program.init()
    for _ in range(2):
        state, metrics = program.meta_step(program.data, state)
    jax.block_until_ready(metrics)
    times, updates, cpu = [], 0, cpu_seconds()
    for _ in range(meta_steps):
        began = time.perf_counter()
        state, metrics = program.meta_step(program.data, state)
        updates += int(jax.block_until_ready(metrics)["inner_steps"])
        times.append(time.perf_counter() - began)
    cpu = cpu_seconds() - cpu
    each, deciles = updates / meta_steps, statistics.quantiles(times, n=10)
    return {
        **{"rule": run.rule, "devices": jax.device_count()},
        "meta_parameters": sum(x.size for x in jax.tree.leaves(state.theta)),
        "inner_steps_per_second": each / statistics.median(times),
        "inner_steps_per_second_10th_90th": [each / deciles[-1], each / deciles[0]],
        "inner_steps_per_cpu_second": updates / cpu,
    }


def floor(*, pairs: int = 8, truncation: int = 50, meta_steps: int = 40) -> dict[str, Any]:
    """Microseconds an inner step of the parts alone, of the whole, and of its FLOPs at a matrix product's rate."""
    import jax
    import jax.numpy as jnp
    import optax

    import tasks
    from lopt import rules

    copies, key = 2 * pairs, jax.random.key(0)
    task = tasks.make("image_mlp", data=["digits", "mnist5k"], size=8, hidden=[WIDTHS[1]])
    rule = rules.make("small_fc")
    keys, phi = jax.random.split(key, copies), task.sample(key)
    params = jax.vmap(lambda k: task.init(k, phi))(keys)
    batches = jax.vmap(lambda k: task.batch(k, phi, task.data, "train"))(keys)
    theta = jax.vmap(lambda k: rule.init_theta(k))(keys)
    tx = lambda theta: rule.bind(theta, num_steps=1000, nonfinite="propagate", diagnostics=False)  # noqa: E731
    states = jax.vmap(lambda t, p: tx(t).init(p))(theta, params)

    def batch(carry, k):
        drawn = jax.vmap(lambda key: task.batch(jax.random.fold_in(key, k), phi, task.data, "train"))(keys[:pairs])
        return carry + drawn.x.sum() + drawn.y.sum(), None

    def gradients(params, k):
        grads = jax.vmap(jax.grad(lambda p, b: task.loss(p, key, phi, b)))(params, batches)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), None

    def update(carry, k):
        params, states = carry

        def one(theta, params, state):
            updates, state = tx(theta).update(params, state, params, value=jnp.float32(2.0))
            return optax.apply_updates(params, updates), state

        return jax.vmap(one)(theta, params, states), None

    def seconds(body: Callable[..., Any], carry: Any) -> float:
        """Median of a window of one part, an inner step."""
        window = jax.jit(lambda carry: jax.lax.scan(body, carry, jnp.arange(truncation))[0])
        jax.block_until_ready(window(carry))
        times = []
        for _ in range(meta_steps):
            began = time.perf_counter()
            jax.block_until_ready(window(carry))
            times.append(time.perf_counter() - began)
        return statistics.median(times) / (copies * truncation)

    parts = {
        "batch": seconds(batch, jnp.zeros(())),
        "forward and backward": seconds(gradients, params),
        "rule": seconds(update, (params, states)),
    }
    square = jnp.ones((1024, 1024))
    product, times = jax.jit(jnp.matmul), []
    for _ in range(12):
        began = time.perf_counter()
        jax.block_until_ready(product(square, square))
        times.append(time.perf_counter() - began)
    peak = 2 * 1024**3 / min(times)
    inputs, hidden, outputs = WIDTHS
    products = 2 * BATCH * (inputs * hidden + hidden * outputs)
    # Backward: as much again for the weights, and once more for the inputs of the second layer alone.
    network = 2 * products + 2 * BATCH * hidden * outputs
    size = inputs * hidden + hidden + hidden * outputs + outputs
    flops = {"forward and backward": network, "rule": size * _update_cost().small_fc_cost(4).flops}
    whole = 1 / measure(pairs=pairs, truncation=truncation, meta_steps=meta_steps)["inner_steps_per_second"]
    return {
        "pairs": pairs,
        "peak_gflops": peak / 1e9,
        "flops": flops,
        "us": {name: 1e6 * s for name, s in parts.items()} | {"whole": 1e6 * whole},
        "floor_us": {name: 1e6 * n / peak for name, n in flops.items()},
    }


def _update_cost() -> Any:
    """The benchmark of one update, which counts the rules' FLOPs."""
    spec = importlib.util.spec_from_file_location("update_cost", HERE / "update_cost.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["update_cost"] = module
    spec.loader.exec_module(module)
    return module


def startup() -> dict[str, float]:
    """Seconds from the call to the first meta-step that is recorded."""
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        for name in ("cold", "warm"):
            words = ["quickstart", "--compare", "", "--log-every", "1", "--out", f"{folder}/{name}"]
            record, began = Path(folder, name, "metrics.jsonl"), time.perf_counter()
            command, quiet = [sys.executable, "-m", "meta_train", *words], subprocess.DEVNULL
            process = subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet)
            while process.poll() is None and not (record.exists() and record.stat().st_size):
                time.sleep(0.01)
            out[name] = time.perf_counter() - began
            process.send_signal(signal.SIGTERM)
            if process.wait() != 128 + signal.SIGTERM:
                raise SystemExit(f"lopt-train quickstart ended with {process.returncode} before it was stopped")
    return out


def child(what: str, devices: int, flags: str = "", **options: Any) -> Any:
    """A measurement in a process of its own, with so many host devices."""
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {flags}".strip()}
    command = [sys.executable, __file__, "--child", json.dumps([what, options])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(row: dict[str, Any]) -> None:
    speed, per_cpu = row["inner_steps_per_second"], row["inner_steps_per_cpu_second"]
    low, high = row["inner_steps_per_second_10th_90th"]
    print(
        f"{row['rule']:9s} {row['devices']:d} devices {row['pairs']:4d} pairs  truncation {row['truncation']:4d}  "
        f"{row['params']:6d} params {speed:10,.0f}/s ({low:,.0f}-{high:,.0f}) {per_cpu:9,.0f} per CPU-second  "
        f"{speed / REFERENCE:5.1f}x and {per_cpu / REFERENCE:5.1f}x the reference  {1e6 / speed:7.2f} us",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--pairs", type=int, nargs="+", default=[8, 16, 32, 64], help="of the section speed")
    parser.add_argument("--meta-steps", type=int, default=40, help="that are measured")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too, after every section")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        from lopt.console import prepare_jax

        prepare_jax()
        what, settings = json.loads(options.child)
        print(json.dumps({"measure": measure, "floor": floor, "l2o": l2o}[what](**settings)))
        return
    cores, count = os.cpu_count() or 1, {"meta_steps": options.meta_steps}
    report: dict[str, Any] = {"machine": f"{platform.machine()}, {cores} cores", "reference": REFERENCE}

    def rows(settings: list[dict[str, Any]], devices: int = cores) -> list[dict[str, Any]]:
        out = []
        for one in settings:
            out.append(child("measure", devices, **(count | one)))
            show(out[-1])
        return out

    def section(name: str) -> Any:
        print(f"\n{name}", flush=True)
        if name == "speed":
            return rows([{"pairs": n} for n in options.pairs])
        if name == "scaling":
            return {
                "pairs": rows([{"pairs": n} for n in (2, 4, 8, 16, 32, 64)]),
                "truncation": rows([{"truncation": k} for k in (10, 25, 50, 100, 200)]),
                "params": rows([{"hidden": h} for h in (16, 32, 64, 128, 256)]),
            }
        if name == "devices":
            return [row for n in (1, 2) for row in rows([{"pairs": 16}], n)]
        if name == "velo":
            return rows([{"pairs": 2, "truncation": 10, "rule": "velo", "meta_steps": min(10, options.meta_steps)}], 1)
        if name == "startup":
            found = startup()
        elif name == "l2o":
            found = child("l2o", cores, **count)
        else:
            found = child("floor", 1, "--xla_cpu_multi_thread_eigen=false", **count)
        print(json.dumps(found, indent=1), flush=True)
        return found

    for name in options.only:
        report[name] = section(name)
        if options.json:
            Path(options.json).parent.mkdir(parents=True, exist_ok=True)
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
