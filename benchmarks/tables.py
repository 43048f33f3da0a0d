"""Write what benchmarks/meta_train.py measured into the tables of docs/performance.md and docs/scaling.md.

    python benchmarks/meta_train.py --json runs/meta_train.json
    python benchmarks/tables.py runs/meta_train.json

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; those whose section was not measured are left as they are.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("docs/performance.md", "docs/scaling.md")
TARGET = 10.0  # times the reference's inner steps per second of wall-clock
VELO_TPU_MONTHS = 4000  # Metz et al. (2022), arXiv:2211.09760, abstract: "approximately"
HOURS_A_MONTH = 365.25 * 24 / 12


class Size(NamedTuple):
    """A run to be computed; nothing of it is from a paper."""

    what: str
    meta_steps: int
    pairs: int
    inner_steps: int  # of a copy in one meta-step: the truncation, or the mean length of whole episodes

    @property
    def total(self) -> int:
        """Inner steps, both signs."""
        return 2 * self.pairs * self.inner_steps * self.meta_steps


SIZES = (
    Size("`pes`, K = 50", 50_000, 64, 50),
    Size("`pes`, K = 50", 200_000, 512, 50),
    Size("`full_es`, mean episode 2,000", 200_000, 512, 2_000),
    Size("`full_es`, mean episode 10,000", 200_000, 4_096, 10_000),
)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown; all columns but the first are to the right."""
    header = list(header)
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _brief(x: float) -> str:
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def speed(report: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    reference = report["reference"]
    cells = []
    for row in rows:
        low, high = row["inner_steps_per_second_10th_90th"]
        each, per_cpu = row["inner_steps_per_second"], row["inner_steps_per_cpu_second"]
        met = "yes" if each >= TARGET * reference else "no"
        cells.append(
            [
                *(f"{row['pairs']}", f"{each:,.0f} ({low:,.0f} to {high:,.0f})", f"{each / reference:.1f}", met),
                *(f"{per_cpu:,.0f}", f"{per_cpu / reference:.1f}"),
            ]
        )
    over = "over the reference"
    header = ["pairs", "inner steps/s (10th to 90th percentile)", over, f"≥ {TARGET:.0f}×", "per CPU-second", over]
    return f"{report['machine']}.\n\n" + table(header, cells)


def scaling(report: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> str:
    """µs an inner step, and an inner step and unit where that should be constant."""
    out = []
    for name, rows in found.items():
        cells = []
        for row in rows:
            us = 1e6 / row["inner_steps_per_second"]
            window = us * 2 * row["pairs"] * row["truncation"] / 1e3
            cells.append([f"{row[name]:,}", f"{us:.1f}", f"{window:.1f}", f"{window / row[name]:.4g}"])
        out.append(table([name, "µs an inner step", "ms a meta-step", f"ms a meta-step / {name}"], cells))
    return "\n\n".join(out)


def devices(report: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    one = rows[0]["inner_steps_per_second"]
    cells = (
        [f"{r['devices']}", f"{r['inner_steps_per_second']:,.0f}", f"{r['inner_steps_per_second'] / one:.2f}"]
        for r in rows
    )
    return table(["host devices", "inner steps/s", "over one"], cells)


def startup(report: dict[str, Any], found: dict[str, float]) -> str:
    limits = {"cold": 20, "warm": 8}
    cells = ([name, f"{found[name]:.1f}", f"{limit}"] for name, limit in limits.items())
    return table(["compilation cache", "seconds to the first meta-step", "allowed"], cells)


def floor(report: dict[str, Any], found: dict[str, Any]) -> str:
    us, flops, least = found["us"], found["flops"], found["floor_us"]
    parts = ("batch", "forward and backward", "rule")
    cells = []
    for name in parts:
        known = [f"{flops[name]:,.0f}", f"{least[name]:.1f}"] if name in flops else ["", ""]
        cells.append([name, f"{us[name]:.1f}", *known, f"{us[name] / us['whole']:.0%}"])
    rest = us["whole"] - sum(us[name] for name in parts)
    cells.append(["resets, noise, meta-optimizer and what does not overlap", f"{rest:.1f}", "", "", ""])
    total = f"{sum(flops.values()):,.0f}", f"{sum(least.values()):.1f}", "100%"
    cells.append(["whole", f"{us['whole']:.1f}", *total])
    ratio = us["whole"] / sum(least.values())
    return table(["part, on one device with one thread", "µs an inner step", "FLOPs", "floor, µs", "share"], cells) + (
        f"\n\nA matrix product of 1,024 × 1,024 does {found['peak_gflops']:.0f} GFLOP/s there; the whole takes "
        f"{ratio:.1f} times its floor."
    )


def velo(report: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Arithmetic with the measured speed of one device."""
    (row,) = rows
    rate, hours = row["inner_steps_per_second"], VELO_TPU_MONTHS * HOURS_A_MONTH
    each = 4 * row["meta_parameters"] / 1e6
    cells = []
    for size in SIZES:
        device_hours = size.total / rate / 3600
        numbers = (size.meta_steps, size.pairs, size.total)
        cells.append(
            [
                size.what,
                *(f"{n:,}" for n in numbers[:2]),
                f"{size.total:.1e}",
                _brief(device_hours),
                _brief(device_hours / 24 / 256),
                _brief(size.meta_steps * each / 1e6),
            ]
        )
    header = [
        *("estimator", "meta-steps", "pairs", "inner steps", "device-hours"),
        *("days on 256 devices", "TB all-reduced a device"),
    ]
    return (
        f"One device of {report['machine']} does {rate:,.0f} inner steps/s of `velo` (MLP of {row['params']:,} params, "
        f"{row['meta_parameters']:,} meta-parameters, {row['pairs']} pairs):\n\n{table(header, cells)}\n\n"
        f"The paper's {VELO_TPU_MONTHS:,} TPU-months are {hours:,.0f} device-hours; in as many hours this device would "
        f"do {hours * 3600 * rate:.1e} inner steps of this task."
    )


def l2o(report: dict[str, Any], row: dict[str, Any]) -> str:
    """Against the published recipe in torch: 120 rounds of 100 steps of 64 instances in 348 s, on a busy core."""
    rate, (low, high) = row["inner_steps_per_second"], row["inner_steps_per_second_10th_90th"]
    reference = 120 * 100 * 64 / 348
    cells = [
        f"{rate:,.0f} ({low:,.0f} to {high:,.0f})",
        f"{row['inner_steps_per_cpu_second']:,.0f}",
        f"{6400 / rate:.2f}",
        f"{rate / reference:.1f}",
    ]
    header = ["inner steps/s (10th to 90th percentile)", "per CPU-second", "s a round of 6,400", "over torch"]
    return (
        f"{report['machine']}; torch did {reference:,.0f} a second on one core that was not idle.\n\n"
        f"{table(header, [cells])}"
    )


TABLES = {
    "speed": speed,
    "scaling": scaling,
    "devices": devices,
    "startup": startup,
    "floor": floor,
    "velo": velo,
    "l2o": l2o,
}


def fill(text: str, report: dict[str, Any]) -> str:
    """A page with the tables of what was measured."""
    for name, make in TABLES.items():
        if name in report:
            block = f"<!-- {name} -->\n{make(report, report[name])}\n<!-- /{name} -->"
            text = re.sub(rf"<!-- {name} -->\n.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.DOTALL)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="that benchmarks/meta_train.py wrote with --json")
    report = json.loads(parser.parse_args().report.read_text())
    for page in PAGES:
        path = ROOT / page
        path.write_text(fill(path.read_text(), report))


if __name__ == "__main__":
    main()
