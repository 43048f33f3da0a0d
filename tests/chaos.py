"""`make chaos`: a run is killed with kill -9 at least fifty times and its checkpoints are damaged thirty times.

It must end with the theta and the metrics of a run that nobody disturbed, and every damage that matters must be told by
the process that goes on: "checkpoint N is damaged". Whether one matters is found out here, apart from what the run
itself does: Orbax alone reads the arrays before and after, and they and the seal's bytes are compared. Damage to a file
that nobody reads (marks of completion, Orbax's copies and descriptions) changes neither, and is counted as such.

    python -m tests.chaos [--kills 50] [--damages 30] [--seed 0] [--estimator pes]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
META_STEPS = 600
ARGUMENTS = [
    *("quickstart", "--compare", "", "--meta-steps", str(META_STEPS), "--checkpoint-every", "3", "--log-every", "1"),
    *("--estimator.pairs", "2", "--estimator.truncation", "5", "--horizon.low", "5", "--horizon.high", "20"),
    *("--rule-settings", '{"hidden": 2}', "--groups.0.settings", '{"data": ["digits"], "hidden": [4]}'),
]


def begin(cwd: Path, log: Path, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-m", "meta_train.launch", *arguments]
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def result(folder: Path) -> tuple[str, list[dict]]:
    """What must not differ: the weights and the record, without speeds."""
    weights = hashlib.sha256((folder / "artifact/model.safetensors").read_bytes()).hexdigest()
    record = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return weights, [{k: v for k, v in line.items() if k != "inner_steps_per_second"} for line in record]


class Damage(NamedTuple):
    """What was done to a checkpoint."""

    step: int
    did: str
    matters: bool


def reading(step: Path, like: Any = None) -> tuple[Any, bytes] | None:
    """What Orbax alone reads in a checkpoint, as arrays by name, and the bytes of its seal; None if it cannot.

    A run knows what shapes it saved, and so restores without their description: `like` says them here.
    """
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    try:
        with ocp.StandardCheckpointer() as reader:
            arrays = reader.restore(step.absolute() / "state", like)
        return jax.tree.map(np.asarray, arrays), (step / "seal/metadata").read_bytes()
    except Exception:  # one of many kinds
        return None


def alike(a: tuple[Any, bytes], b: tuple[Any, bytes] | None) -> bool:
    """Whether two readings are the same bit for bit."""
    return b is not None and a[1] == b[1] and all(x.tobytes() == b[0][name].tobytes() for name, x in a[0].items())


def damage(folder: Path, rng: random.Random) -> Damage | None:
    """Flip a byte of, truncate or delete a file of the newest checkpoint, if it and another one are whole.

    Where none is left a run refuses to go on, and keeps what there is.
    """
    steps = [path for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]
    *others, newest = sorted(steps, key=lambda path: int(path.name)) or [None]
    if not any(reading(path) for path in others) or (before := reading(newest)) is None:
        return None
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    path, how = rng.choice(files), rng.choice(("flip", "truncate", "delete"))
    content = bytearray(path.read_bytes())
    if how == "delete" or not content:
        path.unlink()
    elif how == "truncate":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    return Damage(int(newest.name), f"{how} {path.relative_to(folder)}", not alike(before, reading(newest, before[0])))


def told(log: str, pending: list[Damage]) -> list[Damage]:
    """Those that the process of this log did not come to see. Ends the script if it saw one and was silent."""
    if not ("resuming at" in log or "starting again" in log):
        return pending  # killed before
    for one in pending:
        if one.matters and f"checkpoint {one.step} is damaged" not in log:
            raise SystemExit(f"chaos: SILENT ERROR: {one.did} was not told:\n{log}")
    return []


def kill_once(cwd: Path, log: Path, first: bool, rng: random.Random) -> bool:
    """Start or resume, kill -9 after a random number of meta-steps or seconds; False if the run came to its end."""
    folder = cwd / "run"
    arguments = [*ARGUMENTS, "--out", "run"] if first else ["resume", "run"]
    process = begin(cwd, log, *arguments)
    target, limit = lines(folder) + rng.randint(1, 9), time.monotonic() + rng.uniform(1, 60)
    while process.poll() is None and time.monotonic() < limit and lines(folder) < target:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    code = process.wait()
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"chaos: the run ended with {code}:\n{log.read_text()}")
    return code != 0


def main() -> int:
    """Returns the exit code: 0 if nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--damages", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--estimator", default="pes")
    args = parser.parse_args()
    rng, began = random.Random(args.seed), time.monotonic()
    ARGUMENTS.extend(["--estimator.name", args.estimator])
    cwd = Path(tempfile.mkdtemp(prefix="lopt-chaos-"))
    log = cwd / "log"
    whole = begin(cwd, log, *ARGUMENTS, "--out", "whole").wait()
    if whole:
        raise SystemExit(f"chaos: the undisturbed run failed:\n{log.read_text()}")
    done: list[Damage] = []
    pending: list[Damage] = []
    kills = 0
    while kills < args.kills or len(done) < args.damages:
        if not kill_once(cwd, log, not (cwd / "run" / "config.json").exists(), rng):
            raise SystemExit(f"chaos: the run ended after kill {kills}, damage {len(done)}: raise META_STEPS")
        pending = told(log.read_text(), pending)
        # As likely at each kill as is needed to come to the number that was asked for; after the last, always.
        due = rng.random() * (args.kills - kills) < args.damages - len(done)
        did = damage(cwd / "run", rng) if due else None
        if did:
            done.append(did)
            pending.append(did)
        kills += 1
        says = f"  {did.did}{'' if did.matters else ' (nobody reads it)'}" if did else ""
        print(f"kill {kills} at meta-step {lines(cwd / 'run')}{says}", flush=True)
    if begin(cwd, log, "resume", "run").wait():
        raise SystemExit(f"chaos: the run cannot go on:\n{log.read_text()}")
    pending = told(log.read_text(), pending)
    same = result(cwd / "run") == result(cwd / "whole")
    minutes, matter = (time.monotonic() - began) / 60, sum(one.matters for one in done)
    shows = not pending and (matter or not args.damages)
    print(
        f"{args.estimator}: {kills} kills, {len(done)} checkpoints damaged: {matter} so that it matters, all told"
        f", and {len(done) - matter} in what nobody reads; weights and record "
        f"{'equal those of' if same else 'DIFFER FROM'} the undisturbed run; {minutes:.1f} minutes"
    )
    if same:
        shutil.rmtree(cwd)
    if not shows:
        print("chaos: no damage was met that matters: it shows nothing; more --kills or --damages")
    return 0 if same and shows else 1


if __name__ == "__main__":
    sys.exit(main())
