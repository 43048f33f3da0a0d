"""`lopt-train`: meta-train from a named config, resume, export.

JAX is imported only after the arguments are found good, so that help and errors come at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import io
import itertools
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from lopt.console import fail, prepare_jax, span, write_whole
from meta_train import config as cfg
from meta_train.estimators import WHOLE_EPISODES
from meta_train.nowcast_config import Nowcasting

T = TypeVar("T")
DEFAULT = "quickstart"  # config of `lopt-train --task ...`
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
UNWRITABLE += (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT)
START = "init_from"  # a run's copy of the artifact that it starts at
USAGE = """usage: lopt-train CONFIG [--key value ...] [--out DIR]   meta-train; CONFIG --help lists the keys
                                                      CONFIG is a named one, a file.py that defines RUN,
                                                      package.module:name of a Run, or the
                                                      config.json of a run or of weights
       lopt-train --task package.module:function ...  the same with a task of one's own, by the quickstart's recipe
       lopt-train CONFIG ... --dry-run                shapes, memory, speed, how long it would take; writes nothing
       lopt-train CONFIG ... --profile                with a JAX trace of some meta-steps in the run directory
       lopt-train resume DIR                          go on after an interruption
       lopt-train export DIR [--to DIR] [--last]      write the artifact of the newest checkpoint: the best theta
                                                      where there is meta-validation, or the last one
       lopt-train list                                the named configs

       with --distributed, CONFIG and resume join the other processes of a run: docs/scaling.md

A run directory holds config.json, metrics.jsonl, tensorboard/, checkpoints/, artifact/ and pictures; of
nowcasts also trajectories/, the runs that were recorded."""


@dataclasses.dataclass(frozen=True)
class Join:
    """How several processes meet; SLURM, Kubernetes and TPU pods say the last three themselves."""

    distributed: bool = False  # join the other processes of the run
    coordinator: str = ""  # host:port of process 0
    processes: int = 0  # how many there are
    process_id: int = -1  # this one's number, from 0


@dataclasses.dataclass(frozen=True)
class Launch:
    """Meta-train a learned optimizer."""

    run: Annotated[cfg.Run, tyro.conf.arg(name="")]
    join: Annotated[Join, tyro.conf.arg(name="")] = Join()
    # One's own family as package.module:function instead of the config's groups; may be repeated. Settings are those of
    # groups.0, groups.1, ... The current directory is on the import path, at its end.
    task: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    out: str = ""  # run directory; must not exist. Default: the first free runs/NAME, runs/NAME-2, ...
    dry_run: bool = False  # say what the run would be, how fast and how long, and write nothing
    profile: bool = False  # write a JAX trace of some meta-steps into the run directory


@dataclasses.dataclass(frozen=True)
class LaunchNowcasts:
    """Record training runs, and meta-train networks that predict where they go."""

    run: Annotated[Nowcasting, tyro.conf.arg(name="")]
    out: str = ""  # run directory; must not exist. Default: the first free runs/NAME, runs/NAME-2, ...


@dataclasses.dataclass(frozen=True)
class Resume:
    """Go on where the newest good checkpoint is."""

    directory: tyro.conf.Positional[str]
    join: Annotated[Join, tyro.conf.arg(name="")] = Join()


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the artifact of the newest good checkpoint."""

    directory: tyro.conf.Positional[str]
    to: str = ""  # folder to write; must not exist. Default: DIR/artifact
    last: bool = False  # the last theta, also where meta-validation found a better one


def main(argv: list[str] | None = None) -> int:
    args = sys.argv[1:] if argv is None else argv
    command = args[0] if args else "--help"
    try:
        if command in ("-h", "--help"):
            print(USAGE)
        elif command == "list":
            print("\n".join(f"{name:20} {line}" for name, line in cfg.named().items()))
        elif command == "resume":
            return resume(_cli(Resume, args[1:], "lopt-train resume"))
        elif command == "export":
            return export(_cli(Export, args[1:], "lopt-train export"))
        elif command.partition("=")[0] == "--task":  # a task of one's own needs no config: the rest is the quickstart's
            return start(DEFAULT, args)
        else:
            return start(command, args[1:])
    except ValueError as e:
        return fail(e)
    except OSError as e:
        if e.errno not in UNWRITABLE:
            raise
        return fail(
            f"lopt-train: {e.filename or 'the run directory'}: {e.strerror}; valid: a folder that can be written, with "
            "room. Checkpoints that were saved are kept, and `lopt-train resume` goes on from them."
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def parse(name: str, args: list[str]) -> Launch | LaunchNowcasts:
    """A named config with keys replaced by the command line. Raises ValueError in one line."""
    run = cfg.load(name)
    if isinstance(run, Nowcasting):
        return _cli(LaunchNowcasts, args, f"lopt-train {name}", default=LaunchNowcasts(run))
    # Before the rest is parsed, since the keys of groups are there for as many groups as there are.
    own = [b for a, b in itertools.pairwise(args) if a == "--task"]
    own += [word.removeprefix("--task=") for word in args if word.startswith("--task=")]
    if own:
        run = dataclasses.replace(run, groups=tuple(cfg.Group(family) for family in own))
    return _cli(Launch, args, f"lopt-train {name}", default=Launch(run))


def _pinned(run: cfg.Run) -> cfg.Run:
    """The run as it is recorded: with the tasks of its suite, and the data that its sources serve."""
    run = _with_suite(run)
    prepare_jax()
    from meta_train import groups

    return groups.pinned(run)


def _cli(kind: type[T], args: list[str], program: str, default: Any = tyro.MISSING_NONPROP) -> T:
    """Arguments as a dataclass. Raises ValueError in one line."""
    words = io.StringIO()
    try:
        with contextlib.redirect_stderr(words):
            return tyro.cli(kind, args=args, prog=program, console_outputs=True, default=default)
    except SystemExit as e:
        if not e.code:
            raise
        raise ValueError(f"{program}: {_one_line(words.getvalue())}") from None


def _one_line(box: str) -> str:
    """tyro's message without its frame, its title and its pointer to the help."""
    lines = [line.strip(" │") for line in box.splitlines() if not re.match(r"[╭╰]|│ ─", line)]
    text = " ".join(line for line in lines if line)
    text = re.sub(r"invalid literal for int\(\) with base 10: ('.*?')", r"got \1; valid: an integer", text)
    text = re.sub(r"could not convert string to float: ('.*?')", r"got \1; valid: a number", text)
    return re.split(r" For full helptext| Argument helptext", text)[0]


def start(name: str, args: list[str]) -> int:
    """A new run in a new directory."""
    launch = parse(name, args)
    if isinstance(launch, LaunchNowcasts):
        return _start_nowcasts(launch)
    if launch.dry_run:
        if launch.join != Join():
            raise ValueError("lopt-train --dry-run: what it says is of one process; valid: no --distributed.")
        run = _in_one_place(_pinned(launch.run))
        program = _build(run)
        from meta_train import dry_run

        for line in dry_run.report(run, program):
            print(line, flush=True)
        return 0
    if launch.join.distributed and not launch.out:
        raise ValueError("lopt-train --distributed: no --out; valid: a new folder, the same for all processes.")
    with _joined(launch.join) as writes:
        run = _pinned(launch.run)
        _same_everywhere(run)
        program = _build(run)  # every name and value is known to be good from here on
        folder = Path(launch.out)

        def make() -> None:
            nonlocal folder
            folder = _new_folder(launch.out, run.name)
            _write_config(folder, run)
            if run.init_from:  # the run can then go on wherever it came from
                from lopt.pretrained import find

                shutil.copytree(find(run.init_from), folder / START)

        _by_the_first(writes, make)
        with _locked(folder) if writes else contextlib.nullcontext():
            return _go(run, program, folder, profile=launch.profile and writes)


def _start_nowcasts(launch: LaunchNowcasts) -> int:
    prepare_jax()
    from meta_train import nowcast

    run = nowcast.pinned(launch.run)  # every name is known to be good from here on
    folder = _new_folder(launch.out, run.name)
    _write_config(folder, run)
    with _locked(folder):
        return nowcast.go(run, folder)


def _write_config(folder: Path, run: Any) -> None:
    write_whole(folder / "config.json", json.dumps(run.to_json(), indent=2) + "\n")


@contextlib.contextmanager
def _joined(join: Join) -> Iterator[bool]:
    """Join the other processes, if there are any; tells whether this one writes the run directory."""
    if not join.distributed:
        stray = [name for name, got in dataclasses.asdict(join).items() if got != getattr(Join, name)]
        if stray:
            raise ValueError(f"lopt-train: --{stray[0].replace('_', '-')} means nothing without --distributed.")
        yield True
        return
    from meta_train import distributed

    distributed.check(join.coordinator, join.processes, join.process_id)
    distributed.supervised()
    prepare_jax()
    distributed.initialize(join.coordinator, join.processes, join.process_id)
    with distributed.ends_with_the_others():
        yield distributed.first()


def _by_the_first(writes: bool, action: Callable[[], None]) -> None:
    """What only the process that writes does; if it fails, all of them end."""
    from meta_train import distributed

    error = None
    try:
        if writes:
            action()
    except (ValueError, OSError) as e:
        error = e
    distributed.refuse_together(error)


def _same_everywhere(run: cfg.Run) -> None:
    """Raise ValueError in every process if one of them was given another run: their collectives would not meet."""
    from meta_train import distributed

    distributed.refuse_others(cfg.sha256(run.to_json()))


def _suites(option: str) -> dict[str, Any]:
    """The evaluation suites' tasks by name, told by a process of its own: nothing imports that package.

    Raises ValueError, naming the option that wants them, where it is not installed.
    """
    command = [sys.executable, "-m", "meta_test", "list", "suites", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"lopt-train: {option} needs lopt-eval: pip install 'lopt[eval]', or {option} '' for none.")
    return json.loads(done.stdout)


def _with_suite(run: cfg.Run) -> cfg.Run:
    """The run whose meta-validation names the tasks of its suite themselves: what is recorded says what was done."""
    on = run.validation
    if not on.suite:
        return run
    suites = _suites("--validation.suite")
    if on.suite not in suites:
        raise ValueError(
            f"config.validation.suite: unknown suite {on.suite!r}; valid: {', '.join(suites)}, or '' for none."
        )
    tasks = tuple(cfg.Group(problem["family"], problem["settings"]) for problem in suites[on.suite])
    return dataclasses.replace(run, validation=dataclasses.replace(on, suite="", tasks=(*on.tasks, *tasks)))


def _build(run: cfg.Run, folder: Path | None = None):
    """The program of a config, of an existing run if a folder is given.

    Raises ValueError in one line for whatever it cannot be built of.
    """
    if run.compare:
        suites = _suites("--compare")
        if run.compare not in suites:
            raise ValueError(
                f"config.compare: unknown suite {run.compare!r}; valid: {', '.join(suites)}, or '' for none."
            )
    prepare_jax()
    from meta_train import loop

    try:
        return loop.build(run, folder / START if folder and (folder / START).is_dir() else None)
    except ValueError:
        raise
    except Exception as e:  # a setting of another type fails wherever it is first used
        raise ValueError(f"lopt-train: the config cannot be built: {type(e).__name__}: {str(e)[:300]}") from e


def _in_one_place(run: cfg.Run) -> cfg.Run:
    """The run with all groups in this process."""
    return dataclasses.replace(run, groups=tuple(dataclasses.replace(g, processes=()) for g in run.groups))


def resume(args: Resume) -> int:
    """Go on where the newest good checkpoint is."""
    folder, run = _read_run(args.directory)
    if isinstance(run, Nowcasting):
        if args.join != Join():
            raise ValueError("lopt-train resume: nowcasts are trained in one process; valid: no --distributed.")
        prepare_jax()
        from meta_train import nowcast

        with _locked(folder):
            return nowcast.go(run, folder)
    with _joined(args.join) as writes, _locked(folder) if writes else contextlib.nullcontext():
        _same_everywhere(run)
        return _go(run, _build(run, folder), folder)


def export(args: Export) -> int:
    """Write the artifact of the newest good checkpoint."""
    folder, run = _read_run(args.directory)
    target = Path(args.to) if args.to else folder / "artifact"
    if args.to and target.exists():
        raise ValueError(f"lopt-train export: {target} exists; valid: a new folder.")
    with contextlib.nullcontext() if args.to else _locked(folder):  # a run writes its artifact when it ends
        return _export(args, run, folder, target)


def _export(args: Export, run: Any, folder: Path, target: Path) -> int:
    if isinstance(run, Nowcasting):
        prepare_jax()
        from meta_train import nowcast

        for line in nowcast.export(run, *nowcast.read_state(run, folder), target, last=args.last):
            print(line)
        return 0
    program = _build(_in_one_place(run), folder)
    from meta_train import artifact, loop
    from meta_train.checkpoint import Checkpoints

    checkpoints = Checkpoints(folder / "checkpoints", run.identity())
    at, state, passed_over = checkpoints.restore(program.shapes)
    checkpoints.close()
    for line in passed_over:
        print(line, file=sys.stderr)
    if at < 0:
        raise ValueError(f"lopt-train export: {folder} has no checkpoint that can be read.")
    chosen = artifact.choose(state, last=args.last)
    artifact.write(target, run, program.rule, chosen, metrics=loop.read_metrics(folder))
    print(f"{target}: {chosen.says}")
    return 0


def _read_run(directory: str) -> tuple[Path, Any]:
    folder = Path(directory)
    path = folder / "config.json"
    try:
        tree = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ValueError(f"lopt-train: {directory} is not a run directory: {path}: {e}.") from None
    if isinstance(tree, dict) and "format_version" in tree:
        raise ValueError(f"lopt-train: {directory} is an artifact and not a run directory; lopt.load reads it.")
    try:
        return folder, cfg.from_json(tree)
    except ValueError as e:
        raise ValueError(f"lopt-train: {path}: {e}") from None
    except TypeError as e:
        raise ValueError(f"lopt-train: {path} is damaged: {e}.") from None


def _new_folder(out: str, name: str) -> Path:
    """Make the run directory; an existing one is never used again."""
    if out:
        folder = Path(out)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise ValueError(
                f"lopt-train: --out {folder} exists; valid: a new folder, or `lopt-train resume {folder}` to go on."
            ) from None
        except OSError as e:
            raise ValueError(f"lopt-train: --out {folder} cannot be made: {e.strerror}.") from None
        return folder
    for n in range(1, 10_000):
        folder = Path("runs") / (name if n == 1 else f"{name}-{n}")
        try:
            Path("runs").mkdir(exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            if folder.exists():
                continue
            raise ValueError("lopt-train: runs is a file; valid: a folder, or name one with --out.") from None
        except OSError as e:
            raise ValueError(f"lopt-train: {folder} cannot be made: {e.strerror}; name a folder with --out.") from None
        return folder
    raise ValueError(f"lopt-train: runs/{name}-* are all taken; name one with --out.")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep others out of a run directory while this process works in it."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"lopt-train: {folder} is in use by another process.") from None
        except OSError as e:
            raise ValueError(
                f"lopt-train: {folder} cannot be locked: {e.strerror}; valid: a file system with locks (a local one, "
                "NFS, Lustre mounted with flock)."
            ) from None
        yield


def _compare(target: Path, suite: str, folder: Path) -> int:
    """Run the evaluation suite in its own process: nothing imports it, and it starts with fresh devices."""
    command = ["lopt-eval", "compare", str(target), "--suite", suite, "--out", str(folder), "--force"]
    process = subprocess.Popen([sys.executable, "-m", "meta_test", *command[1:]])

    def stop(number, frame):
        process.terminate()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        print(f"stopped; the weights are in {target}; compare them with: {shlex.join(command)}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _differs_from_start(rule, folder: Path) -> Iterator[str]:
    """Settings that the weights a run starts at were meta-trained with, and that it changes."""
    if not (folder / START).is_dir():
        return
    from lopt.pretrained import read

    other, _ = read(folder / START)
    for name, value in rule.settings.items():
        if (theirs := other.settings[name]) != value:
            yield f"init_from: {name} was {theirs!r} there and is {value!r} here"


def _shorter_warmup(run: cfg.Run) -> Iterator[str]:
    from meta_train import meta_optimizer

    spec = run.meta_optimizer
    yield from meta_optimizer.shorter_warmup(
        "meta_optimizer.warmup", spec.warmup, meta_optimizer.updates(spec, run.meta_steps)
    )


def _go(run: cfg.Run, program, folder: Path, *, profile: bool = False) -> int:
    """Train, then write what a run leaves behind."""
    from meta_train import artifact, distributed, loop

    first = distributed.first()

    def say(text: str) -> None:
        if first:
            print(text, flush=True)

    began = time.monotonic()
    parameters = artifact.count(program.rule)
    each = [stage.inner_steps for stage in program.stages]
    steps = f"{min(each)} to {max(each)}" if min(each) < max(each) else each[0]
    at_most = " at most" if run.estimator.name in WHOLE_EPISODES and run.horizon.low < run.horizon.high else ""
    say(
        f"{run.name}: rule {run.rule} ({parameters} meta-parameters), {run.meta_steps} meta-steps of "
        f"{steps} inner steps{at_most}, run directory {folder}"
    )
    for line in [*_differs_from_start(program.rule, folder), *_shorter_warmup(run)]:
        say(line)
    state, came = loop.train(run, program, folder, say, profile=profile)
    state = distributed.gather(state._replace(estimators=(), opt=()))
    distributed.part()
    if not first:
        return 128 + came if came else 0
    if came:
        say(f"stopped and saved at meta-step {int(state.step)}; go on with: lopt-train resume {folder}")
        return 128 + came
    say(f"meta-trained in {span(time.monotonic() - began)}")
    metrics = loop.read_metrics(folder)
    chosen = artifact.choose(state)
    target = artifact.write(folder / "artifact", run, program.rule, chosen, metrics=metrics)
    if run.validation.tasks:
        say(f"exported: {chosen.says}")
    artifact.plot_meta_loss(folder / "meta_loss.png", run, metrics)
    code = 0
    if run.compare:
        code = _compare(target, run.compare, folder)
    say(
        f"\nresults: {folder}\nuse the weights:\n"
        f"  import lopt\n"
        f"  tx = lopt.load({str(target)!r}, num_steps=1000)  # an optax transform: init, then one update a step\n"
        f"  updates, opt_state = tx.update(grads, opt_state, params, value=loss)"
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
