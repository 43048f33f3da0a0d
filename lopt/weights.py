"""`lopt-weights`: import weights that exist elsewhere, look at those that are here. JAX loads after the arguments."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lopt.console import Parser, fail

FORMATS = ("celo", "learned_optimization", "pylo")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="lopt-weights", description="Import and inspect the weights of learned optimizers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = "make an artifact, for lopt.load, of weights in another format"
    get = commands.add_parser("import", help=about, description=f"{about}; no pickle is read")
    add = get.add_argument
    add("source", nargs="+", metavar="SOURCE", help="file, folder or hf:owner/name; two for PyLO's VeLO (MLP, RNN)")
    add("--format", required=True, choices=FORMATS, help=f"one of: {', '.join(FORMATS)}", metavar="F")
    add("--to", required=True, type=Path, metavar="DIR", help="folder to make; must not exist")
    add("--rule", metavar="R", help="rule the weights are for, where they fit several (PyLO: small_fc, mulo, elo)")
    example = """setting that the file does not say: step_mult=0.001, 'decays={"v": [0.99]}'"""
    add("--set", dest="settings", nargs="+", action="extend", default=[], metavar="KEY=JSON", help=example)
    add("--revision", action="append", metavar="REV", help="commit of a hub source, 40 hex digits; once a source")
    add("--sha256", action="append", metavar="H", help="of the weights file, demanded for the hub; once a source")
    show = commands.add_parser("show", help="print what an artifact holds", description="Print what an artifact holds.")
    show.add_argument("artifact", metavar="DIR", help="folder of an artifact, or a shipped name")
    commands.add_parser("list", help="print the shipped weights", description="Print the shipped weights.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `lopt-weights`; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        return {"import": _import, "show": _show, "list": _list}[args.command](args)
    except (ValueError, OSError) as e:
        return fail(e)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130


def _import(args: argparse.Namespace) -> int:
    if os.path.lexists(args.to):
        raise ValueError(f"lopt-weights: --to, {args.to} exists; valid: a folder that does not.")
    settings = dict(_setting(text) for text in args.settings)
    from lopt import convert, pretrained

    pins = {"revision": args.revision, "sha256": args.sha256}
    decays = settings.pop("decays", None)
    got = convert.read(args.source, format=args.format, rule=args.rule, decays=decays, settings=settings, **pins)
    args.to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.to.parent, prefix=".lopt-weights-") as partial:
        made = Path(partial) / "artifact"
        pretrained.save(made, got.rule, got.theta, provenance=got.provenance, card=_card(args.to.name, got))
        made.rename(args.to)
    return _show(argparse.Namespace(artifact=args.to))


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    try:
        if key and equals:
            return key, json.loads(value, parse_constant=_no_number)
    except (ValueError, RecursionError):
        pass
    raise ValueError(f'lopt-weights: --set, got {text!r}; valid: KEY=JSON, e.g. step_mult=0.001 or compat="pylo".')


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _card(name: str, got: Any) -> str:
    lines = [f"# {name}", "", f"Weights of rule `{got.rule.name}`, imported by `lopt-weights import`.", ""]
    return "\n".join([*lines, *(f"- {key}: {json.dumps(value)}" for key, value in got.provenance.items()), ""])


def _show(args: argparse.Namespace) -> int:
    from lopt import pretrained

    folder = pretrained.find(args.artifact)
    rule, theta = pretrained.read(folder)  # raises if the sha256 is wrong
    config = json.loads((folder / pretrained.CONFIG).read_text())
    print(f"rule: {rule.name}")
    print(f"settings: {json.dumps(dict(rule.settings))}")
    print(f"meta-parameters: {sum(x.size for x in pretrained.named_leaves(theta).values()):,}")
    print(f"needs: {', '.join(sorted(rule.needs)) or 'nothing'}")
    print(f"sha256: ok {config['sha256']}")
    for key, value in dict(config.get("provenance") or {}).items():
        print(f"provenance {key}: {json.dumps(value)}")
    return 0


def _list(args: argparse.Namespace) -> int:
    from lopt import pretrained

    for name in pretrained.available():
        rule, theta = pretrained.read(name)
        print(f"{name}  {rule.name}  {sum(x.size for x in pretrained.named_leaves(theta).values()):,} meta-parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
