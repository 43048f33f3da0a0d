"""Write docs/verification.md: which property of the contract holds for which rule, and how near each recording comes.

make test && LOPT_SHARED=../shared .venv/bin/python -m tests.verification
"""

from __future__ import annotations

import os
import re
import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import parity  # noqa: E402

from lopt import rules  # noqa: E402

HEAD = """# What is verified

Made by `make test-all && LOPT_SHARED=../shared .venv/bin/python -m tests.verification` from the results of the tests.
"""


def contract(junit: Path) -> list[str]:
    """A row a test of tests/test_rules_contract.py, a column a rule: passed of all its cases."""
    counts: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for case in ET.parse(junit).iter("testcase"):
        named = re.fullmatch(r"test_(\w+)\[(.*)\]", case.get("name", ""))
        if not (named and case.get("classname", "").endswith("test_rules_contract")):
            continue
        rule = next((part for part in named[2].split("-") if part in rules.REGISTRY), None)
        if rule:
            counts[named[1].replace("_", " ")][rule][1] += 1
            counts[named[1].replace("_", " ")][rule][0] += not len(case)
    names = sorted(rules.REGISTRY)
    lines = ["| property | " + " | ".join(f"`{name}`" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for what, by_rule in counts.items():
        if set(by_rule) == set(names):
            failed = {name: cases - passed for name, (passed, cases) in by_rule.items()}
            lines.append(
                f"| {what} | " + " | ".join(f"{failed[n]} FAILED" if failed[n] else "yes" for n in names) + " |"
            )
    return lines


def recordings(shared: Path) -> list[str]:
    """A row a recording: steps, tensors, allowed and largest difference over all of them."""
    lines = ["| recording | rule | steps × tensors | allowed | largest difference |", "|---|---|---|---|---|"]
    for name, case in parity.CASES.items():
        recording = parity.read(shared / f"parity/{name}.npz")
        errors = list(parity.errors(name, recording))
        worst = max(max(step.values()) for step in errors)
        settings = ", ".join(f"{k}={v!r}" for k, v in case.settings.items())
        size = f"{len(errors)} × {len(recording.p0)}"
        lines.append(f"| {name} | `{case.rule}({settings})` | {size} | {case.atol:.0e} | {worst:.1e} |")
    return lines


def main() -> int:
    """Returns the exit code."""
    junit, shared = ROOT / "runs/tests/junit.xml", Path(os.environ.get("LOPT_SHARED", ROOT.parent / "shared"))
    for needed in (junit, shared):
        if not needed.exists():
            print(f"tests.verification: no {needed}", file=sys.stderr)
            return 2
    about = [
        "The tests are those of tests/test_rules_contract.py, one name a row; `yes`: each of its cases passed.",
        "Recorded trajectories of other implementations, replayed by tests/parity.py: the largest absolute difference\n"
        "of any element after any step. Wrong variants of each rule are noticed by tests/test_parity.py.",
    ]
    text = [HEAD, "## The contract of an optax transform\n", about[0], "", *contract(junit)]
    text += ["", "## Recordings reproduced\n", about[1], "", *recordings(shared), ""]
    (ROOT / "docs/verification.md").write_text("\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
