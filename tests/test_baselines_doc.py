"""docs/baselines.md says what the code does. `python tests/test_baselines_doc.py` prints its table."""

from __future__ import annotations

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import test_baselines_parity as parity

from lopt import baselines

ROOT = Path(__file__).parents[1]
HEADER = "| name | source | searched (default) | needs | schedules | state, B/param | checked against | to know |"


def number(x: float) -> str:
    """Up to five digits, without a leading 0."""
    return re.sub(r"^0\.", ".", f"{x:.5g}")


def space(key: str, s) -> str:
    if s.choices:
        return f"{key} {{{', '.join(map(number, s.choices))}}} ({number(s.default)})"
    if s.log:
        return f"{key} {s.low:.2g} … {s.high:.2g} log ({number(s.default)})"
    return f"{key} {number(s.low)} … {number(s.high)} ({number(s.default)})"


def state_bytes(tx, shape) -> str:
    state = jax.eval_shape(tx.init, {"w": jax.ShapeDtypeStruct(shape, jnp.float32)})
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return number(round(total / math.prod(shape), 2))


def row(name: str) -> str:
    b = baselines.get(name)
    source = re.sub(r"arXiv:(\d+\.\d+)", r"[\1](https://arxiv.org/abs/\1)", b.source)
    tx = b.make(num_steps=10)
    sizes = [state_bytes(tx, shape) for shape in ((1024, 1024), (4096,))]
    ways = {"recording": parity.CASES, "steps by hand": parity.HAND}
    checked = "; ".join(way for way, names in ways.items() if name in names) or "–"
    cells = [
        f"`{name}`",
        source,
        "; ".join(space(key, s) for key, s in b.space.items()) or "–",
        ", ".join(sorted(b.needs)) or "–",
        ", ".join(b.schedules),
        sizes[0] if sizes[0] == sizes[1] else f"{sizes[0]}; vectors {sizes[1]}",
        checked,
        b.notes + ("; " if b.notes and b.deterministic_only else "") + ("full batches only" * b.deterministic_only)
        or "–",
    ]
    return "| " + " | ".join(cells) + " |"


def table() -> list[str]:
    return [HEADER, "|---" * HEADER.count(" | ") + "|---|", *(row(name) for name in baselines.names())]


def test_the_table_is_what_the_code_says():
    lines = (ROOT / "docs/baselines.md").read_text().splitlines()
    start = lines.index(HEADER)
    assert lines[start : start + len(baselines.names()) + 2] == table()
    assert not lines[start + len(baselines.names()) + 2].startswith("|")


if __name__ == "__main__":
    print("\n".join(table()))
