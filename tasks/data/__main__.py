"""`python -m tasks.data` prints the table of the embedded data sets that docs/data.md has."""

from __future__ import annotations

from tasks import data
from tasks.base import SPLITS


def table() -> str:
    """Markdown: a row a data set."""
    lines = ["| name | rows | sizes | classes | train / validation / test | kB | licence |"]
    lines += ["|---|---|---|--:|---|--:|---|"]
    for name, entry in sorted(data._manifest().items()):
        rows = f"{entry['shape'][0]:,} "
        rows += "characters" if entry["kind"] == "text" else f"of {'×'.join(map(str, entry['shape'][1:]))}"
        splits = " / ".join(f"{entry['splits'][split]:,}" for split in SPLITS)
        sizes = ", ".join(map(str, sorted(data.POOLING.get(name, ())))) or "–"
        size = (data.FOLDER / entry["file"]).stat().st_size / 1000
        cells = [name, rows, sizes, str(entry["classes"] or "–"), splits, f"{size:,.0f}", entry["licence"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
