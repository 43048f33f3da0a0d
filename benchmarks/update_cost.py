"""What an update costs: ms, ns per parameter and extra memory of every rule, as a ratio to optax.adamw.

    python benchmarks/update_cost.py [--trees 1M 10M] [--rules small_fc velo] [--dtypes f32] [--json FILE]

Trees: 1M is 4 matrices of 512 x 512, 10M has GPT-2's shapes in 150 leaves, 100M is one 10,000 x 10,000 leaf; 300small
is 300 leaves of 1,024 elements and 1large one leaf of as many parameters. An update is `tx.update` under jit, gradients
and state donated, without the step of the parameters; adamw and the rule take turns, and their medians are compared.

- trace: JAX's part of a first call, before XLA compiles; both come once.
- identity: no rule, but a state like small_fc's that is handed on; what is left for 300 leaves is above this row.
- temp: XLA's temporary memory in the compiled update. RSS: growth of this process's peak over the first call.
- floor: the larger of FLOPs over this machine's matrix product rate and bytes over its bandwidth, as measured at the
  start. Both are counted by hand below for a large float32 matrix, in the least number of passes: one over gradient,
  parameters and state for the statistics that the features are normalised with, and one that reads them again and
  writes state and update. Newton-Schulz is counted for the tree at hand.

All trees take about half an hour on two cores. Run it on an idle machine; nothing else publishes these numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lopt import rules

Shapes = dict[str, tuple[int, ...]]
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
VALUE = np.float32(2.0)  # a loss, for the rules that need one


def gpt2(width: int = 192, layers: int = 12, vocabulary: int = 12_288, context: int = 1024) -> Shapes:
    """GPT-2 with an output layer of its own: 150 leaves, 10.3 million parameters."""
    block = {
        "norm1/scale": (width,),
        "norm1/bias": (width,),
        "attention/in/w": (width, 3 * width),
        "attention/in/b": (3 * width,),
        "attention/out/w": (width, width),
        "attention/out/b": (width,),
        "norm2/scale": (width,),
        "norm2/bias": (width,),
        "mlp/in/w": (width, 4 * width),
        "mlp/in/b": (4 * width,),
        "mlp/out/w": (4 * width, width),
        "mlp/out/b": (width,),
    }
    ends = {
        "tokens": (vocabulary, width),
        "positions": (context, width),
        "norm/scale": (width,),
        "norm/bias": (width,),
        "output/w": (width, vocabulary),
        "output/b": (vocabulary,),
    }
    return ends | {f"block{i}/{k}": shape for i in range(layers) for k, shape in block.items()}


TREES: dict[str, Shapes] = {
    "1M": {f"w{i}": (512, 512) for i in range(4)},
    "10M": gpt2(),
    "100M": {"w": (10_000, 10_000)},
    "300small": {f"w{i}": ((32, 32), (1024,), (64, 16))[i % 3] for i in range(300)},
    "1large": {"w": (640, 480)},
}


class Cost(NamedTuple):
    """By hand, for one parameter of a large float32 matrix; a multiply-add is two, exp and rsqrt are ten and two."""

    flops: float
    bytes: float


def network(full: int, factored: int, hidden: int, outputs: int = 2) -> int:
    """FLOPs of the MLP: features of full size are multiplied in, those of rows and of columns only added."""
    first = 2 * full * hidden + (2 * hidden if factored else 0)
    return first + 2 * hidden + 2 * hidden * hidden + 2 * hidden + 2 * hidden * outputs


# Three momenta (9), v and its root (6), m/root (3), row x column factors (3) on g (3) and m (3), the means of rows and
# columns (2); second moments of 16 features (32) for which the features are computed once more (16).
ADAFACTOR = 29 + 32 + 16
STEP = 14  # exp of the magnitude, three factors, learning rate
TWO_PASSES = 24 + 24 + 20  # g, p, m x 3 and v are read twice; m x 3, v and the update written


def small_fc_cost(hidden: int) -> Cost:
    return Cost(ADAFACTOR + network(16, 12, hidden) + STEP, TWO_PASSES)


def velo_cost(hidden: int) -> Cost:
    # Two more features, clipped g and g/root; the LSTM's features take 8 more FLOPs (centred moments of m and v).
    return Cost(ADAFACTOR + 8 + 8 + network(18, 12, hidden, 3) + STEP, TWO_PASSES)


class Rule(NamedTuple):
    make: Callable[[], optax.GradientTransformationExtraArgs]
    cost: Cost
    newton_schulz: bool = False


def learned(name: str, **settings: Any) -> Callable[[], optax.GradientTransformationExtraArgs]:
    def make() -> optax.GradientTransformationExtraArgs:
        rule = rules.make(name, **settings)
        return rule.bind(rule.init_theta(jax.random.key(0)), num_steps=1000)

    return make


def identity() -> optax.GradientTransformationExtraArgs:
    """Hands on gradients and the state of small_fc: what JAX itself takes for so many arrays."""

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del params, extra
        return grads, state

    return optax.GradientTransformationExtraArgs(learned("small_fc")().init, update)


RULES: dict[str, Rule] = {
    "identity": Rule(identity, Cost(0, 0)),
    "adamw": Rule(lambda: optax.adamw(1e-3), Cost(16, 28)),
    "lion": Rule(lambda: optax.lion(1e-4), Cost(10, 20)),
    "muon": Rule(lambda: optax.contrib.muon(1e-3), Cost(10, 28), newton_schulz=True),
    "nn_adam": Rule(learned("nn_adam"), Cost(16, 24)),
    "mlp": Rule(learned("mlp"), Cost(18 + 16 + network(8, 0, 32) + STEP, 32 + 32 + 28)),
    "small_fc": Rule(learned("small_fc"), small_fc_cost(4)),
    "small_fc_h32": Rule(learned("small_fc", hidden=32), small_fc_cost(32)),
    "mulo": Rule(learned("mulo"), small_fc_cost(32)),
    "elo": Rule(learned("elo"), small_fc_cost(32)),
    "tiny": Rule(learned("tiny"), Cost(ADAFACTOR + 30 + network(14, 3, 8, 1) + STEP, TWO_PASSES + 8)),
    "tiny_orthogonal": Rule(  # lopt-base
        learned("tiny", pace=8, newton_schulz=True, decay=0.15, fan_in=1.0),
        Cost(ADAFACTOR + 30 + network(14, 3, 8, 1) + STEP, TWO_PASSES + 8),
        newton_schulz=True,
    ),
    "celo": Rule(learned("celo"), velo_cost(4)),
    "velo": Rule(learned("velo"), velo_cost(4)),
    "celo2_plain": Rule(learned("celo2", newton_schulz=False), velo_cost(8)._replace(bytes=TWO_PASSES + 8)),
    "celo2": Rule(learned("celo2"), velo_cost(8)._replace(bytes=TWO_PASSES + 8), newton_schulz=True),
}


def newton_schulz_flops(shapes: Shapes) -> float:
    """Of five iterations on the matrices: three products each; the Gram matrix is of the shorter side."""
    sides = [sorted(shape) for shape in shapes.values() if len(shape) == 2]
    return sum(5 * (4 * short**2 * long + 2 * short**3) for short, long in sides)


class Peak(NamedTuple):
    flops: float  # per second, float32 matrix product
    bytes: float  # per second, read and written


def measure_peak() -> Peak:
    x, big = jnp.ones((2048, 2048)), jnp.ones(64 << 20)
    product, triad = jax.jit(jnp.matmul), jax.jit(lambda a, b: a + 2.0 * b, donate_argnums=0)
    jax.block_until_ready((product(x, x), triad(big + 0, big)))
    seconds, moved = [], []
    for _ in range(10):
        seconds.append(timed(product, x, x)[0])
        moved.append(timed(triad, big + 0, big)[0])
    return Peak(2 * 2048**3 / min(seconds), 12 * big.size / min(moved))


def timed(f: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    jax.block_until_ready(args)
    began = time.perf_counter()
    out = jax.block_until_ready(f(*args))
    return time.perf_counter() - began, out


def peak_rss() -> int:
    """Bytes, the most this process has had since `forget_peak`; 0 where Linux is not."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def forget_peak() -> None:
    refs = Path("/proc/self/clear_refs")
    if refs.exists():
        refs.write_text("5")


def available_bytes() -> float:
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), math.inf)


class Runner:
    """A compiled update and the state it carries from call to call."""

    def __init__(self, rule: Rule, params: Any):
        tx = optax.with_extra_args_support(rule.make())
        abstract = jax.eval_shape(lambda tree: tree, params)
        self.init = jax.jit(tx.init)
        update = jax.jit(lambda g, s, p: tx.update(g, s, p, value=VALUE), donate_argnums=(0, 1))
        state = jax.eval_shape(tx.init, params)
        began = time.perf_counter()
        lowered = update.lower(abstract, state, abstract)
        traced = time.perf_counter()
        self.update = lowered.compile()
        self.trace_seconds, self.compile_seconds = traced - began, time.perf_counter() - traced
        self.temp_bytes = self.update.memory_analysis().temp_size_in_bytes
        self.rss_bytes = 0

    def start(self, params: Any, grads: Any) -> None:
        """Run once, which touches all memory."""
        self.params, self.grads, self.state = params, grads, jax.block_until_ready(self.init(params))
        donated = jax.block_until_ready(jax.tree.map(jnp.copy, grads))
        forget_peak()
        before = peak_rss()
        _, self.state = jax.block_until_ready(self.update(donated, self.state, self.params))
        self.rss_bytes = peak_rss() - before

    def seconds(self) -> float:
        donated = jax.tree.map(jnp.copy, self.grads)
        took, (_, self.state) = timed(self.update, donated, self.state, self.params)
        return took


def draw(shapes: Shapes, dtype: Any, scale: float, seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        k: jnp.asarray(scale * rng.standard_normal(s, np.float32) * rng.lognormal(), dtype) for k, s in shapes.items()
    }


def take_turns(adamw: Runner, rule: Runner, repeats: int, budget: float) -> tuple[float, float]:
    """Median seconds of each; fewer repeats than asked for, but at least 5, once the budget in seconds is used up."""
    ours, theirs, began = [], [], time.perf_counter()
    while len(ours) < repeats and (len(ours) < 5 or time.perf_counter() - began < budget):
        theirs.append(adamw.seconds())
        ours.append(rule.seconds())
    return statistics.median(theirs), statistics.median(ours)


def measure(tree: str, dtype: str, names: list[str], peak: Peak, options: argparse.Namespace) -> Iterator[dict]:
    """One row a rule."""
    shapes = TREES[tree]
    size = sum(math.prod(s) for s in shapes.values())
    params, grads = draw(shapes, DTYPES[dtype], 0.05, 0), draw(shapes, DTYPES[dtype], 0.01, 1)
    adamw = Runner(RULES["adamw"], params)
    adamw.start(params, grads)
    for name in names:
        rule = RULES[name]
        flops = rule.cost.flops + (newton_schulz_flops(shapes) / size if rule.newton_schulz else 0.0)
        floor = size * max(flops / peak.flops, rule.cost.bytes / peak.bytes)
        row = {"tree": tree, "dtype": dtype, "rule": name, "params": size, "leaves": len(shapes)}
        row |= {"flops_per_param": flops, "bytes_per_param": rule.cost.bytes, "floor_ms": 1e3 * floor}
        if rule.newton_schulz and floor > options.budget:
            yield row | {"skipped": f"Newton-Schulz alone takes {floor:.0f} s"}
            continue
        runner = Runner(rule, params)
        row |= {
            "trace_s": runner.trace_seconds,
            "compile_s": runner.compile_seconds,
            "temp_mib": runner.temp_bytes / 2**20,
        }
        # State, its copy during init and one copy of the gradient beside XLA's own.
        if runner.temp_bytes + 28 * size > 0.9 * available_bytes():
            yield row | {"skipped": "memory"}
            continue
        runner.start(params, grads)
        base, took = take_turns(adamw, runner, options.repeats, options.budget)
        row |= {"rss_mib": runner.rss_bytes / 2**20, "ms": 1e3 * took, "adamw_ms": 1e3 * base, "ratio": took / base}
        row |= {"ns_per_param": 1e9 * took / size}
        yield row | {"over_floor": took / floor} if floor else row


COLUMNS = {  # header -> (key, format)
    "ms": ("ms", "9.2f"),
    "x adamw": ("ratio", "8.1f"),
    "ns/param": ("ns_per_param", "9.2f"),
    "temp MiB": ("temp_mib", "9.1f"),
    "RSS MiB": ("rss_mib", "8.1f"),
    "trace s": ("trace_s", "8.1f"),
    "compile s": ("compile_s", "10.1f"),
    "FLOP/param": ("flops_per_param", "11.0f"),
    "B/param": ("bytes_per_param", "8.0f"),
    "floor ms": ("floor_ms", "9.2f"),
    "x floor": ("over_floor", "8.1f"),
}


def show(row: dict[str, Any]) -> None:
    def cell(key: str, form: str) -> str:
        width = int(form.split(".")[0])
        return format(row[key], form) if key in row else "–".rjust(width)

    cells = " ".join(cell(key, form) for key, form in COLUMNS.values())
    print(f"{row['rule']:13s} {cells}  {row.get('skipped', '')}".rstrip(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trees", nargs="+", choices=TREES, default=list(TREES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of parameters and gradients")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds a rule, after which 5 repeats are enough")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too, after every row")
    options = parser.parse_args()
    peak = measure_peak()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, JAX {jax.__version__}, optax {optax.__version__}"
    print(f"{machine}; {peak.flops / 1e9:.0f} GFLOP/s, {peak.bytes / 1e9:.0f} GB/s")
    rows: list[dict[str, Any]] = []
    for tree in options.trees:
        for dtype in options.dtypes:
            headers = " ".join(header.rjust(int(form.split(".")[0])) for header, (_, form) in COLUMNS.items())
            print(f"\n{tree} {dtype}\n{'':13s} {headers}")
            for row in measure(tree, dtype, options.rules, peak, options):
                rows.append(row)
                show(row)
                if options.json:
                    report = {"machine": machine, "peak": peak._asdict(), "rows": rows}
                    Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
