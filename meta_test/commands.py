"""What `lopt-eval run`, `tune` and `report` do once their arguments are known to be good."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lopt.console import progress, span
from meta_test import cells, session
from meta_test.entrants import Entrant, met, resolve
from meta_test.suites import DEFAULT_BASELINES, SUITES, Problem


def entrants(specs: str) -> list[Entrant]:
    """Those named, each once; "defaults" are DEFAULT_BASELINES. Raises ValueError."""
    named = [
        name for spec in specs.split(",") if spec for name in (DEFAULT_BASELINES if spec == "defaults" else [spec])
    ]
    found = [resolve(name) for name in dict.fromkeys(named)]
    seen: dict[str, str] = {}
    for name, entrant in zip(dict.fromkeys(named), found, strict=True):
        if seen.setdefault(entrant.name, name) != name:
            raise ValueError(
                f"lopt-eval: {name} and {seen[entrant.name]} are both called {entrant.name}; valid: folders whose last "
                "two names differ."
            )
    return found


def problems(args: argparse.Namespace) -> list[Problem]:
    """Of the suite, or those of --only."""
    suite = {problem.name: problem for problem in SUITES[args.suite]}
    if not args.only:
        return list(suite.values())
    wanted = args.only.split(",")
    unknown = [name for name in wanted if name not in suite]
    if unknown:
        raise ValueError(f"lopt-eval: --only, got {unknown[0]!r}; valid: {', '.join(suite)}.")
    return [suite[name] for name in wanted]


def cache_of(args: argparse.Namespace) -> Path:
    """Where tuned cells are written: --cache, with --ship inside the package, else in the user's folder of caches."""
    if getattr(args, "ship", False) and args.cache:
        raise ValueError("lopt-eval: --ship, got --cache too; valid: one of them.")
    folder = args.cache or (cells.SHIPPED if getattr(args, "ship", False) else cells.home())
    if not cells.writable(folder):
        raise ValueError(f"lopt-eval: {folder} cannot be written to; valid: --cache DIR.")
    return folder / cells.folder_of(args.suite)


def tune(args: argparse.Namespace) -> int:
    """Fill the cache."""
    todo = session.jobs(problems(args), entrants(args.optimizers), args.seeds, args.trials, whole=not args.only)
    folder = cache_of(args)
    if args.dry_run:
        print(estimate(todo))
        return 0
    store = session.Store(None, folder, (folder, *([args.cache] if args.cache else []), cells.SHIPPED))
    _warn_of_seeds(todo, store, args.seeds)
    counts = _fill(f"tune {args.suite}", todo, store, args.seeds)
    print(f"{_counted(counts)}; records in {folder}")
    return 0


def estimate(todo: Sequence[session.Job]) -> str:
    """What a tuning costs, problem by problem, before any of it is done."""
    lines = []
    for problem in dict.fromkeys(job.cell.problem.name for job in todo):
        mine = [job for job in todo if job.cell.problem.name == problem]
        updates = sum(job.updates for job in mine)
        lines.append(
            f"{problem:20} {len(mine):4} cells {updates:12,} updates {span(session.seconds(mine)):>9} of a core"
        )
    total = session.seconds(todo)
    cores = os.cpu_count() or 1
    return "\n".join(
        [
            *lines,
            f"{len(todo)} cells, {span(total)} of one core of the reference machine, {span(total / 2)} on two; "
            f"here are {cores}. Compiling included; without extensions of the grid, nothing cached.",
        ]
    )


def run(args: argparse.Namespace) -> int:
    """Fill the cells of a run, time the optimizers, write the report."""
    from meta_test import standings
    from meta_test.report import machine

    wanted = entrants(args.optimizers)
    if session.REFERENCE not in [entrant.name for entrant in wanted]:
        wanted = [resolve(session.REFERENCE), *wanted]
    chosen = problems(args)
    todo = session.jobs(chosen, wanted, args.seeds, args.trials, whole=not args.only)
    if args.trials:  # the targets are the tuned reference's
        reference = [entrant for entrant in wanted if entrant.name == session.REFERENCE]
        todo = [*session.jobs(chosen, reference, args.seeds, whole=not args.only), *todo]
    version, path = cells.folder_of(args.suite), args.out / standings.ABOUT
    before = json.loads(path.read_text()) if path.is_file() else {"suite": version, "cells": []}
    if before["suite"] != version:
        raise ValueError(f"lopt-eval: {args.out} holds a run of another suite; valid: another --out.")
    folder, began = cache_of(args), time.monotonic()
    own = args.out / standings.CELLS
    store = session.Store(own, folder, (own, *([args.cache] if args.cache else []), folder, cells.SHIPPED))
    _warn_of_seeds(todo, store, args.seeds)
    used: list[str] = []
    counts = _fill(f"run {args.suite}", todo, store, args.seeds, used)
    if left := len(set(before["cells"]) - set(used)):
        session.warn(
            f"{args.out} holds {left} cells of an earlier command that this one does not ask for, or whose key has "
            f"changed: they stay in {own}, but not in the report. Name all optimizers, or give each command an "
            "--out and join the reports."
        )
    timing = {} if args.no_timing else session.timings(chosen, wanted, _line)
    now = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": machine()}
    about = {
        "suite": version,
        "suite_size": len(SUITES[args.suite]),
        "seeds": args.seeds,
        "command": args.written,
        "wall_seconds": round(time.monotonic() - began, 1),
        **now,
        "problems": {problem.name: problem._asdict() for problem in chosen},
        "cells": sorted(used),
        "counts": counts,
        "met": {entrant.name: met(entrant) for entrant in wanted},
    }
    cells.write(args.out, standings.ABOUT, about)
    if timing:  # --no-timing keeps what was measured before
        cells.write(args.out, standings.TIMING, {**now, "timing": timing})
    print(_counted(counts))
    return write_report([args.out], args.out, None)


def report(args: argparse.Namespace) -> int:
    """The report of one or more runs."""
    if len(args.folders) > 1 and args.out is None:
        raise ValueError("lopt-eval report: --out, got none for several folders; valid: a folder for the joint report.")
    return write_report(args.folders, args.out or args.folders[0], args.seeds)


def write_report(folders: Sequence[Path], out: Path, seeds: int | None) -> int:
    from meta_test import page, standings
    from meta_test.report import write

    board = standings.load(folders, seeds)
    totals = standings.totals(board, board.labels())
    files = page.files(board, totals)
    write(out, files)
    for total in totals:
        rank = f"mean rank {total.rank:4.1f}" if total.rank > 0 else ""
        speed = page.times(total.iqm["validation"], total.interval["validation"]).text
        print(f"{total.label:32} {speed:>20}  {rank}".rstrip())
    print(f"IQM of the validation speed-up over tuned {session.REFERENCE}, 95 % intervals over seeds")
    print(f"written to {out}: {', '.join(files)}")
    return 0


def _warn_of_seeds(todo: Sequence[session.Job], store: session.Store, seeds: int) -> None:
    """Tuned records are of SEEDS seeds; who asks for more tunes anew, which is dear."""
    if seeds <= session.SEEDS:
        return
    lost = [job for job in todo if job.entrant.tuned and cells.of_other_keys(store.folders, job.cell)]
    if lost:
        session.warn(
            f"--seeds {seeds}: of {len(lost)} cells there are records, but of {session.SEEDS} seeds or other versions: "
            f"what is not there yet of {seeds} seeds is tuned anew, up to {span(session.seconds(lost))} of one core of "
            f"the reference machine. --seeds {session.SEEDS} takes what is there."
        )


def _fill(what: str, todo: Sequence[session.Job], store: session.Store, seeds: int, used: Any = None) -> dict[str, int]:
    total = max(int(session.seconds(todo)), 1)
    done = 0.0
    with progress(what, total) as report:

        def tell(seconds: float, note: str) -> None:
            nonlocal done
            done += seconds
            report(min(int(done), total - 1), note)

        counts = session.fill(todo, store, seeds, tell, session.warn, used)
        report(total, "")
        return counts


def _counted(counts: dict[str, int]) -> str:
    return f"cells: {counts['computed']} computed, {counts['kept']} found, {counts['failed']} failed or skipped"


def _line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
