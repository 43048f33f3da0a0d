"""`lopt-eval`: judge an optimizer. Nothing heavy is imported before the arguments are known to be good."""

from __future__ import annotations

import argparse
import datetime
import difflib
import importlib.util
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lopt.console import Parser, fail, prepare_jax, progress
from meta_test.suites import SUITES, Problem

DEFAULT = "quickstart"
FILES = ("comparison.json", "comparison.md", "comparison.png")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lopt-eval", description="Compare learned and tuned hand-designed optimizers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    compare = commands.add_parser(
        "compare",
        help="a learned optimizer, untuned, against AdamW tuned per task",
        description="Run a learned optimizer, untuned, and AdamW tuned for each task of a suite, on the same seeds; "
        f"print a table and write {', '.join(FILES)}.",
    )
    compare.add_argument("optimizer", metavar="OPTIMIZER", help="a shipped name or the folder of an artifact")
    compare.add_argument("--suite", help=f"one of: {', '.join(SUITES)} (default: {DEFAULT})")
    compare.add_argument(
        "--task", metavar="FAMILY", help="instead of a suite: a family, or one's own as package.module:function"
    )
    compare.add_argument("--task-settings", default="{}", metavar="JSON", help="of the family (default: %(default)s)")
    compare.add_argument("--steps", type=int, default=1000, metavar="T", help="of --task (default: %(default)s)")
    compare.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    compare.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 … N-1 (default: %(default)s)")
    compare.add_argument("--force", action="store_true", help="replace a comparison that DIR holds")
    _suite_parsers(commands)
    listing = commands.add_parser(
        "list", help="print the suites or the baselines", description="Print the suites and their tasks, or baselines."
    )
    listing.add_argument("what", nargs="?", choices=("suites", "baselines"), default="suites")
    listing.add_argument("--json", action="store_true", help="for programs: the suites' tasks by suite")
    return parser


def _suite_parsers(commands: Any) -> None:
    """run, tune, report and sweep."""
    run = commands.add_parser(
        "run",
        help="optimizers on a suite, with a report",
        description="Run optimizers on a suite beside tuned AdamW and write a report. What was done before is found "
        "again: an interrupted run resumes at the next cell.",
    )
    tune = commands.add_parser(
        "tune",
        help="tune baselines on a suite",
        description="Tune baselines on every problem of a suite, into a cache.",
    )
    named = "lopt:NAME, names of baselines, folders of artifacts, module:function, or defaults"
    run.add_argument("--optimizers", required=True, metavar="A,B", help=named)
    tune.add_argument("--optimizers", default="defaults", metavar="A,B", help=f"{named} (default: %(default)s)")
    run.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    run.add_argument("--no-timing", action="store_true", help="leave out ms a step and speed-ups in time")
    tune.add_argument("--dry-run", action="store_true", help="print what it costs and do nothing")
    tune.add_argument(
        "--ship", action="store_true", help="write into the package's own cache, for those who release it"
    )
    for one in (run, tune):
        one.add_argument("--suite", default="mini", help=f"one of: {', '.join(SUITES)} (default: %(default)s)")
        one.add_argument("--only", default="", metavar="P,Q", help="problems of the suite")
        one.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 … N-1 (default: %(default)s)")
        one.add_argument("--trials", type=int, choices=(1, 10, 100), help="random search instead of the grid")
        one.add_argument("--cache", type=Path, metavar="DIR", help="of tuned cells (default: ~/.cache/lopt/eval)")
    report = commands.add_parser(
        "report", help="the report of one or more runs", description="Write the report of one or more runs of a suite."
    )
    report.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="made by `lopt-eval run`")
    report.add_argument("--out", type=Path, metavar="DIR", help="folder to write to (default: the first)")
    report.add_argument("--seeds", type=int, metavar="N", help="only seeds 0 … N-1")
    sweep = commands.add_parser(
        "sweep",
        help="final loss against width, depth, horizon or batch",
        description="Final loss of a family against what is varied; baselines keep what was tuned at the first value.",
    )
    sweep.add_argument("--axis", required=True, choices=("width", "depth", "horizon", "batch"))
    sweep.add_argument("--optimizers", required=True, metavar="A,B", help=named)
    sweep.add_argument("--family", default="image_mlp", help="of tasks that has the axis (default: %(default)s)")
    sweep.add_argument("--values", default="", metavar="V,W", help="of the axis (default: from small to large)")
    sweep.add_argument(
        "--steps", type=int, default=500, metavar="T", help="unless the axis is it (default: %(default)s)"
    )
    sweep.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 … N-1 (default: %(default)s)")
    sweep.add_argument(
        "--mup", action="store_true", help="with --axis width: also under the maximal-update parametrisation"
    )
    sweep.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    l2o = commands.add_parser(
        "l2o",
        help="learned and classical methods on composite convex problems",
        description="Relative gaps to certified optima of learned proximal optimizers and classical methods.",
    )
    l2o.add_argument("--problem", default="lasso", choices=L2O, help="(default: %(default)s)")
    l2o.add_argument("--table", default="", metavar="CSV", help="with --problem logistic: a set of your own rows")
    l2o.add_argument("--sets", default="", metavar="A;B", help="of instances, as the table heads them (default: all)")
    l2o.add_argument("--cache", type=Path, metavar="DIR", help="of optima (default: ~/.cache/lopt/eval/l2o)")
    l2o.add_argument("--optimizers", default="", metavar="A,B", help="shipped names or folders of artifacts")
    l2o.add_argument("--rows", default="", metavar="A;B", help="methods whose names hold one of these (default: all)")
    l2o.add_argument("--instances", type=int, default=1024, metavar="N", help="a set at most (default: %(default)s)")
    l2o.add_argument(
        "--far",
        type=int,
        default=32,
        metavar="N",
        help="instances of learned rules beyond k = 100 (default: %(default)s)",
    )
    l2o.add_argument("--seed", type=int, default=0, metavar="S", help="of the instances (default: %(default)s)")
    l2o.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `lopt-eval`; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(words)
    args.written = shlex.join(["lopt-eval", *words])
    if args.command == "list":
        return _list(args.what, args.json)
    if args.command != "compare":
        return _suite(args)
    try:
        rule, theta = _inputs(args)
    except (ValueError, OSError) as e:
        return fail(e)
    try:
        return _compare(args, rule, theta)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130


L2O = (
    "lasso",
    "logistic",
    "elastic_net",
    "group_lasso",
    "nnls",
    "total_variation",
    "matrix_completion",
)  # of l2o_problems
_AFTER = dict.fromkeys(("run", "tune"), "the same command resumes at the next cell")


def _suite(args: argparse.Namespace) -> int:
    """run, tune, report or sweep; the exit code."""
    try:
        _check_suite(args)
        prepare_jax()
        from meta_test import commands, l2o, sweep

        if args.command in ("sweep", "l2o"):
            return sweep.sweep(args) if args.command == "sweep" else l2o.l2o(args)
        return getattr(commands, args.command)(args)
    except (ValueError, OSError) as e:
        return fail(e)
    except KeyboardInterrupt:
        print(f"interrupted: {_AFTER.get(args.command, 'nothing was kept')}", file=sys.stderr)
        return 130


def _check_suite(args: argparse.Namespace) -> None:
    """Raise ValueError for what can be refused before JAX starts."""
    if args.command in ("run", "tune"):
        _check_name(args.suite)
    if getattr(args, "seeds", None) is not None and args.seeds < 1:
        raise ValueError(f"lopt-eval: --seeds, got {args.seeds}; valid: an integer >= 1.")
    if args.command == "sweep" and args.steps < 10:
        raise ValueError(f"lopt-eval: --steps, got {args.steps}; valid: an integer >= 10.")
    out = getattr(args, "out", None)
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"lopt-eval: --out, got {out}; valid: a folder, or a path where one can be made.")
    if args.command != "tune" and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("lopt-eval needs matplotlib: pip install 'lopt[eval]'.")


def _list(what: str, as_json: bool) -> int:
    if what == "baselines":
        from lopt import baselines

        print("\n".join(baselines.names()))
        return 0
    if as_json:
        print(json.dumps({name: [problem._asdict() for problem in problems] for name, problems in SUITES.items()}))
        return 0
    for name, problems in SUITES.items():
        print(name)
        for problem in problems:
            print(f"  {problem.name}: {problem.describe()}; {problem.note}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for what can be refused before JAX starts."""
    if args.task and args.suite:
        raise ValueError("lopt-eval: got --suite and --task; valid: one of them.")
    if args.task and args.steps < 10:
        raise ValueError(f"lopt-eval: --steps, got {args.steps}; valid: an integer >= 10.")
    args.suite = args.suite or DEFAULT
    _check_name(args.suite)
    if args.seeds < 1:
        raise ValueError(f"lopt-eval: --seeds, got {args.seeds}; valid: an integer >= 1.")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"lopt-eval: --out, got {args.out}; valid: a folder, or a path where one can be made.")
    missing = [name for name in ("matplotlib", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"lopt-eval needs {' and '.join(missing)}: pip install 'lopt[eval]'.")
    held = [name for name in FILES if (args.out / name).exists()]
    if held and not args.force:
        raise ValueError(
            f"lopt-eval: {args.out} already holds {', '.join(held)}; pass --force to replace, or another --out."
        )


def _check_name(suite: str) -> None:
    if suite not in SUITES:
        near = difflib.get_close_matches(suite, SUITES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"lopt-eval: unknown suite {suite!r}.{hint} valid: {', '.join(SUITES)}.")


def _inputs(args: argparse.Namespace) -> tuple[Any, Any]:
    """The rule and its theta, with JAX set up and the output folder made. Raises ValueError or OSError."""
    _check(args)
    prepare_jax()
    import lopt

    found = lopt.read(args.optimizer)
    args.problems = SUITES[args.suite]
    if args.task:
        args.suite = args.task
        args.problems = (_own_problem(args),)
    args.out.mkdir(parents=True, exist_ok=True)
    return found


def _own_problem(args: argparse.Namespace) -> Problem:
    """The problem of --task, which is made once to see that it can be. Raises ValueError."""
    import tasks

    try:
        settings = json.loads(args.task_settings)
    except json.JSONDecodeError as e:
        raise ValueError(
            f"lopt-eval: --task-settings, got {args.task_settings!r}: {e}; valid: a JSON object."
        ) from None
    if not isinstance(settings, dict):
        raise ValueError(f"lopt-eval: --task-settings, got {args.task_settings!r}; valid: a JSON object.")
    settings = tasks.pin(args.task, settings)
    tasks.make(args.task, **settings)
    return Problem(
        args.task, settings, args.steps, "named by --task; what it has to do with meta-training is not known"
    )


def _compare(args: argparse.Namespace, rule: Any, theta: Any) -> int:
    from meta_test import compare, figure, report

    label = _label(args.optimizer)
    about = {
        "optimizer": args.optimizer,
        "rule": rule.name,
        "suite": args.suite,
        "seeds": args.seeds,
        "lrs": compare.LRS,
        "command": args.written,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    began = time.monotonic()
    with progress(f"compare {label}", 100) as tell:

        def said(fraction: float, note: str) -> None:
            if fraction >= 0.01:  # before, the ETA would be a guess
                tell(int(100 * fraction), note)

        results = compare.compare(label, rule, theta, args.problems, seeds=args.seeds, lrs=compare.LRS, report=said)
    about["wall_seconds"] = round(time.monotonic() - began, 1)
    tables, line = [report.table(result) for result in results], report.summary(results)
    contents = (
        report.dump(report.record(results, about)),
        report.as_markdown(tables, line, about),
        figure.draw(results),
    )
    report.write(args.out, dict(zip(FILES, contents, strict=True)))
    _show([report.as_rich(one) if sys.stdout.isatty() else report.as_text(one) + "\n" for one in tables])
    print(f"Target: the tuned AdamW's best loss; steps to reach it, and the speed-up. Definitions in {FILES[1]}.")
    print(f"{line}\nwritten to {args.out}: {', '.join(FILES)}")
    return 0


def _label(optimizer: str) -> str:
    """A name for tables: a shipped name, or the last two parts of a path."""
    return "/".join(Path(optimizer).parts[-2:])


def _show(tables: Sequence[Any]) -> None:
    if not sys.stdout.isatty():
        print(*tables, sep="\n")
        return
    from rich.console import Console

    Console(markup=False, highlight=False).print(*tables, sep="\n")
