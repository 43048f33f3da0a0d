"""`lopt-train`: meta-train from a named config, resume, export.

JAX is imported only after the arguments are found good, so that help and errors come at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

from lopt.console import fail, prepare_jax, span
from meta_train import config as cfg

USAGE = """usage: lopt-train CONFIG [--key value ...] [--out DIR]   meta-train; CONFIG --help lists the keys
       lopt-train resume DIR                          go on after an interruption
       lopt-train export DIR [--to DIR]               write the artifact of the newest checkpoint
       lopt-train list                                the named configs

A run directory holds config.json, metrics.jsonl, tensorboard/, checkpoints/, artifact/ and pictures."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """Meta-train a learned optimizer."""

    run: Annotated[cfg.Run, tyro.conf.arg(name="")]
    out: str = ""  # run directory; must not exist. Default: the first free runs/NAME, runs/NAME-2, ...


def main(argv: list[str] | None = None) -> int:
    args = sys.argv[1:] if argv is None else argv
    command = args[0] if args else "--help"
    try:
        if command in ("-h", "--help"):
            print(USAGE)
        elif command == "list":
            print("\n".join(f"{name:20} {line}" for name, line in cfg.named().items()))
        elif command == "resume":
            return resume(*_operands(args, "resume DIR"))
        elif command == "export":
            return export(*_operands(args, "export DIR", option="--to"))
        else:
            return start(command, args[1:])
    except ValueError as e:
        return fail(e)
    return 0


def _operands(args: list[str], usage: str, option: str = "") -> list[str]:
    """The folder, and the option's value if it is given."""
    rest = args[1:]
    if len(rest) == 3 and option and rest[1] == option:
        return [rest[0], rest[2]]
    if len(rest) != 1 or rest[0].startswith("-"):
        raise ValueError(
            f"lopt-train: got {' '.join(args)!r}; valid: lopt-train {usage}{f' [{option} DIR]' if option else ''}."
        )
    return rest


def parse(name: str, args: list[str]) -> Launch:
    """A named config with keys replaced by the command line. Raises ValueError in one line."""
    default = Launch(cfg.load(name))
    words = io.StringIO()
    try:
        with contextlib.redirect_stderr(words):
            return tyro.cli(Launch, default=default, args=args, prog=f"lopt-train {name}", console_outputs=True)
    except SystemExit as e:
        if not e.code:
            raise
        raise ValueError(f"lopt-train {name}: {_one_line(words.getvalue())}") from None


def _one_line(box: str) -> str:
    """tyro's message without its frame, its title and its pointer to the help."""
    lines = [line.strip(" │") for line in box.splitlines() if not re.match(r"[╭╰]|│ ─", line)]
    text = " ".join(line for line in lines if line)
    return re.split(r" For full helptext| Argument helptext", text)[0]


def start(name: str, args: list[str]) -> int:
    """A new run in a new directory."""
    launch = parse(name, args)
    prepare_jax()
    from meta_train import loop

    program = loop.build(launch.run)  # every name and value is known to be good from here on
    folder = _new_folder(launch.out, launch.run.name)
    (folder / "config.json").write_text(json.dumps(launch.run.to_json(), indent=2) + "\n")
    return _go(launch.run, program, folder)


def resume(directory: str) -> int:
    """Go on where the newest good checkpoint is."""
    folder, run = _read_run(directory)
    prepare_jax()
    from meta_train import loop

    return _go(run, loop.build(run), folder)


def export(directory: str, to: str = "") -> int:
    """Write the artifact of the newest good checkpoint."""
    folder, run = _read_run(directory)
    target = Path(to) if to else folder / "artifact"
    if to and target.exists():
        raise ValueError(f"lopt-train export: {target} exists; valid: a new folder.")
    prepare_jax()
    from meta_train import artifact, loop
    from meta_train.checkpoint import Checkpoints

    program = loop.build(run)
    checkpoints = Checkpoints(folder / "checkpoints")
    at, state, passed_over = checkpoints.restore(program.init())
    checkpoints.close()
    for line in passed_over:
        print(line, file=sys.stderr)
    if at < 0:
        raise ValueError(f"lopt-train export: {folder} has no checkpoint that can be read.")
    artifact.write(target, run, program.rule, state.theta, meta_steps=at, metrics=loop.read_metrics(folder))
    print(target)
    return 0


def _read_run(directory: str) -> tuple[Path, cfg.Run]:
    folder = Path(directory)
    path = folder / "config.json"
    try:
        tree = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ValueError(f"lopt-train: {directory} is not a run directory: {path}: {e}.") from None
    try:
        return folder, cfg.Run.from_json(tree)
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
    Path("runs").mkdir(exist_ok=True)
    for n in range(1, 10_000):
        folder = Path("runs") / (name if n == 1 else f"{name}-{n}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise ValueError(f"lopt-train: runs/{name}-* are all taken; name one with --out.")


def _go(run: cfg.Run, program, folder: Path) -> int:
    """Train, then write what a run leaves behind."""
    from meta_train import artifact, loop

    def say(text: str) -> None:
        print(text, flush=True)

    began = time.monotonic()
    parameters = artifact.count(program.rule)
    say(
        f"{run.name}: rule {run.rule} ({parameters} meta-parameters), {run.meta_steps} meta-steps of "
        f"{program.inner_steps} inner steps, run directory {folder}"
    )
    state, came = loop.train(run, program, folder, say)
    if came:
        say(f"stopped and saved at meta-step {int(state.step)}; go on with: lopt-train resume {folder}")
        return 128 + came
    say(f"meta-trained in {span(time.monotonic() - began)}")
    metrics = loop.read_metrics(folder)
    target = artifact.write(
        folder / "artifact", run, program.rule, state.theta, meta_steps=run.meta_steps, metrics=metrics
    )
    artifact.plot_meta_loss(folder / "meta_loss.png", run, metrics)
    code = 0
    if run.compare:
        # Its own process: nothing imports the evaluation suite, and it starts with fresh devices.
        command = ["-m", "meta_test", "compare", str(target), "--suite", run.compare, "--out", str(folder), "--force"]
        code = subprocess.run([sys.executable, *command], check=False).returncode
    say(
        f"\nresults: {folder}\nuse the weights:\n"
        f"  import lopt\n"
        f"  tx = lopt.load({str(target)!r}, num_steps=1000)  # an optax transform: init, then one update a step\n"
        f"  updates, opt_state = tx.update(grads, opt_state, params, value=loss)"
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
