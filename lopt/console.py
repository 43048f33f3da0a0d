"""What the command-line tools share: set-up of JAX on a CPU, progress with an ETA, errors of one line, whole files."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

Report = Callable[[int, str], None]


def prepare_jax() -> None:
    """One host device a core and a persistent compilation cache; call before JAX is imported.

    Settings the environment already has are left alone.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={cores}".strip()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(home / "lopt" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


# Measured on two cores of a Xeon: together half as many inner steps again. XLA keeps the order of sums otherwise, which
# makes each a chain of scalar additions; vectors are as wide as the machine's; small batched products go to Eigen.
# NaN and infinities stay what they are, but x - x and 0 · x, written like this, are 0.
CPU_OPTIONS = {
    "xla_cpu_enable_fast_math": True,
    "xla_cpu_fast_math_honor_nans": True,
    "xla_cpu_fast_math_honor_infs": True,
    "xla_cpu_fast_math_honor_division": True,
    "xla_cpu_fast_math_honor_functions": True,
    "xla_cpu_prefer_vector_width": 512,
    "xla_cpu_experimental_ynn_fusion_type": "",
}


# For a program on several devices of one CPU. They share a pool of as many threads as there are cores, and sit in all
# of them: a product cut into pieces for those threads waits until another device is done, so that one device runs after
# the other (with 64 hidden units half as many inner steps), or, at an all-reduce, until nothing ever is.
ONE_THREAD_EACH = {"xla_cpu_multi_thread_eigen": False}


@functools.cache
def compiler_options(*, devices: int = 1) -> dict[str, Any]:
    """For `jax.jit` of programs that run for long: none but on a CPU, or where this jaxlib does not know them all.

    Args:
      devices: of this process on which the program runs at once.
    """
    import jax

    if jax.default_backend() != "cpu":
        return {}
    options = CPU_OPTIONS | (ONE_THREAD_EACH if devices > 1 else {})
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except RuntimeError:
        return {}
    return options


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; its folder is there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def span(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


@contextmanager
def progress(what: str, total: int, *, start: int = 0, every: float = 10.0) -> Iterator[Report]:
    """Progress with an ETA: a bar on a terminal, else a line every `every` seconds.

    Yields:
      `report(done, note)`; with `done = start`, when preparations are over whose time says nothing about the rest.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        # Rich reckons with the last half minute, in which slow steps report once or never.
        with Progress(*columns, console=Console(stderr=True), speed_estimate_period=3600) as bars:
            bar = bars.add_task(what, total=total, completed=start, note="")
            yield lambda done, note="": bars.update(bar, completed=done, note=note)
        return
    began, last, since = time.monotonic(), 0.0, (start, 0.0)

    def report(done: int, note: str = "") -> None:
        nonlocal last, since
        elapsed = time.monotonic() - began
        if done == start:
            since = (start, elapsed)
        if done >= total or elapsed - last >= every:
            last = elapsed
            left = (elapsed - since[1]) / max(done - since[0], 1) * (total - done)
            eta = f"ETA {span(left)}  " if done > since[0] else ""
            print(f"{what} {done}/{total}  {span(elapsed)}  {eta}{note}".rstrip(), file=sys.stderr, flush=True)
        # The first of all took longer, and says little about the rest.
        since = (done, elapsed) if since == (start, 0.0) else since

    yield report


class Parser(argparse.ArgumentParser):
    """Reports bad input in one line."""

    def error(self, message: str) -> NoReturn:
        sys.exit(fail(f"{self.prog}: {message} (see {self.prog} --help)"))


def fail(message: object) -> int:
    """Print one line of error; return the exit code of bad input."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return 2
