"""The last words of `make test`: what the families cost, where the results lie and how the shipped weights are used."""

from __future__ import annotations

import collections
import re
from pathlib import Path
from xml.etree import ElementTree

RESULTS = Path("runs/tests/junit.xml")


def families(results: Path) -> dict[str, float]:
    """Seconds that each family took in tests/test_families.py, the slowest first; most of them when compiled anew."""
    seconds: collections.Counter[str] = collections.Counter()
    for case in ElementTree.parse(results).iter("testcase"):
        named = re.fullmatch(r"test_\w+\[(\w+)(-\w+)?\]", case.get("name", ""))
        if named and case.get("classname", "").endswith("test_families"):
            seconds[named[1]] += float(case.get("time", 0))
    return dict(seconds.most_common())


def main() -> None:
    import lopt.pretrained

    if RESULTS.is_file():
        slowest = list(families(RESULTS).items())[:4]
        print("slowest families:", ", ".join(f"{family} {seconds:.0f} s" for family, seconds in slowest))
    print(f"""results: {RESULTS}
use the weights:
  import lopt
  tx = lopt.load({lopt.pretrained.DEFAULT!r}, num_steps=1000)  # an optax transform: init, then one update a step
  updates, opt_state = tx.update(grads, opt_state, params, value=loss)""")


if __name__ == "__main__":
    main()
