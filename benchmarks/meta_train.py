"""Inner steps per second of meta-training: small_fc h 4, MLP 64-32-10, batch 64, PES truncation 50.

    python benchmarks/meta_train.py [--json FILE]

An inner step is one inner update of one antithetic sign. Horizons are 100 to 2,000, the meta-loss is that of the
training batch, as in the reference: google/learned_optimization does about 2,700 a CPU-second here, one core busy.
Run it on an idle machine; nothing else publishes this number.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

from lopt.console import prepare_jax

REFERENCE = 2700.0  # inner steps per CPU-second of google/learned_optimization, measured on such a machine
META_STEPS = 40


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(pairs: int) -> dict[str, float]:
    """Median over meta-steps, after two to warm up."""
    import jax

    from meta_train import config as cfg
    from meta_train import loop

    run = cfg.Run(
        name="benchmark",
        rule="small_fc",
        groups=(cfg.Group("image_mlp", {"data": ["digits", "mnist5k"], "size": 8, "hidden": [32]}),),
        estimator=cfg.Estimator(pairs=pairs, std=0.01, truncation=50),
        horizon=cfg.Horizon(100, 2000),
        meta_loss="train",
    )
    began = time.perf_counter()
    program = loop.build(run)
    state = program.init()
    for _ in range(2):
        state, metrics = program.meta_step(program.data, state)
    jax.block_until_ready(metrics)
    start_up = time.perf_counter() - began
    times, cpu = [], cpu_seconds()
    for _ in range(META_STEPS):
        began = time.perf_counter()
        state, metrics = program.meta_step(program.data, state)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - began)
    cpu = cpu_seconds() - cpu
    return {
        "pairs": pairs,
        "inner_steps_per_second": program.inner_steps / statistics.median(times),
        "inner_steps_per_second_10th_90th": [program.inner_steps / q for q in _deciles(times)],
        "inner_steps_per_cpu_second": program.inner_steps * META_STEPS / cpu,
        "seconds_to_second_meta_step": start_up,
    }


def _deciles(times: list[float]) -> tuple[float, float]:
    cut = statistics.quantiles(times, n=10)
    return cut[-1], cut[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    parser.add_argument("--pairs", type=int, nargs="+", default=[8, 32])
    arguments = parser.parse_args()
    # This file has the name of a package of ours, and Python puts its folder first.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    prepare_jax()
    import jax

    machine = f"{platform.machine()}, {jax.device_count()} host devices, JAX {jax.__version__}"
    print(f"{machine}\npairs  inner steps/s (10th-90th percentile)   per CPU-second   over reference  to meta-step 2")
    rows = []
    for pairs in arguments.pairs:
        row = measure(pairs)
        rows.append(row)
        low, high = row["inner_steps_per_second_10th_90th"]
        per_cpu = row["inner_steps_per_cpu_second"]
        print(
            f"{pairs:5d}  {row['inner_steps_per_second']:13,.0f} ({low:,.0f}-{high:,.0f}){per_cpu:22,.0f}"
            f"{per_cpu / REFERENCE:18.1f}x{row['seconds_to_second_meta_step']:17.1f} s",
            flush=True,
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"machine": machine, "reference_per_cpu_second": REFERENCE, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    sys.exit(main())
