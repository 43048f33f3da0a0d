"""The report: one HTML file that needs no network, the same as Markdown, and its numbers as CSV."""

from __future__ import annotations

import csv
import hashlib
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from meta_test import drawing, metrics, standings
from meta_test.session import REFERENCE
from meta_test.standings import Board, Budget, Score, Total

FILES = ("report.html", "report.md", "results.csv", "summary.csv", "budgets.csv")
MOST = 6  # curves drawn in full
RATIOS = np.geomspace(1, 32, 101)
TAUS = (1, 2, 4, 32)  # of the profile's table


class Cell(NamedTuple):
    """Of a table: what is read, and what it is sorted by (NaN at the end)."""

    text: str
    value: float = math.nan


class Table(NamedTuple):
    """Rows under a header; the first column is a name."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


class Section(NamedTuple):
    """A part of the report: paragraphs, figures and tables in this order."""

    title: str
    text: Sequence[str]
    figures: Sequence[str] = ()
    tables: Sequence[Table] = ()


def number(value: float, digits: int = 3, unit: str = "") -> Cell:
    return Cell(f"{value:.{digits}g}{unit}" if math.isfinite(value) else "–", value)


def times(value: float, interval: tuple[float, float] | None = None) -> Cell:
    """A speed-up."""
    if math.isnan(value):
        return Cell("–")
    return Cell(f"{value:.2f}×{_span(interval, '.2f')}", value)


def _span(interval: tuple[float, float] | None, form: str, scale: float = 1) -> str:
    """Of one seed there is none."""
    if interval is None or not all(map(math.isfinite, interval)):
        return ""
    return f" [{format(scale * interval[0], form)}, {format(scale * interval[1], form)}]"


def share(value: float, interval: tuple[float, float]) -> Cell:
    """A win rate."""
    return Cell(f"{100 * value:.0f} %{_span(interval, '.0f', 100)}", value)


def rank(value: float, interval: tuple[float, float]) -> Cell:
    return Cell(f"{value:.1f}{_span(interval, '.1f')}" if value > 0 else "–", value)


def spread(values: np.ndarray, *, percent: bool = False) -> Cell:
    """Mean ± standard deviation over seeds."""
    bad = int((~np.isfinite(values)).sum())
    if bad:
        return Cell(f"diverged ({bad} of {len(values)})", math.inf)
    scale, mean = (100, float(values.mean())) if percent else (1, float(values.mean()))
    deviation = scale * float(values.std(ddof=1)) if len(values) > 1 else math.nan
    text = f"{scale * mean:.1f}" if percent else f"{mean:.4g}"
    more = f" ± {deviation:.1f}" if percent else f" ± {deviation:.1g}"
    return Cell(text + (more if math.isfinite(deviation) else "") + (" %" if percent else ""), scale * mean)


def hit(steps: int | None, speed: float) -> Cell:
    if math.isnan(speed):
        return Cell("no target")
    return Cell(f"{speed:.2f}× (step {steps})" if steps is not None else "0 (never)", speed)


def highlighted(board: Board, totals: Sequence[Total]) -> list[str]:
    """Drawn in full: the reference, what was run untuned, and the best of the others; MOST in all."""
    untuned = {row.label for rows in board.rows.values() for row in rows.values() if row.budget == "untuned"}
    ordered = sorted(totals, key=lambda t: (t.label != REFERENCE, t.label not in untuned, *_by_rank(t)))
    return [total.label for total in ordered[:MOST]]


def sections(board: Board, totals: Sequence[Total], found: Sequence[Budget]) -> list[Section]:
    """The report without its form; of totals and budgets of the board."""
    labels = board.labels()
    if not totals:
        missing = f"No problem has a tuned {REFERENCE} that ended, so that there is nothing to measure against."
        if any(board.scores.values()):
            missing = "There is no problem on which all optimizers were run. " + not_run(board)
        return [Section("Nothing to compare", [missing]), *(_problem(board, p.name, []) for p in board.problems)]
    shown = highlighted(board, totals)
    names = board.common(labels)
    in_ranks = [t for t in totals if not math.isnan(t.rank)]
    difference = metrics.critical_difference(len(in_ranks), len(names))
    every = {label for name in names for label in board.scores[name] if label.startswith(f"{REFERENCE}, T/")}
    parts = sorted(label for label in every if all(label in board.rows[name] for name in names))
    controls = standings.totals(board, [REFERENCE, *parts], names)
    shares = standings.profile(board, labels, RATIOS)
    per_budget = {
        budget: [one.total.label for one in sorted(found, key=lambda b: _by_rank(b.total)) if one.budget == budget]
        for budget in standings.BUDGETS
    }
    within = metrics.critical_difference(len(per_budget[standings.ONE]), len(names))
    out = [
        Section(
            "Over all tasks",
            [
                f"{len(names)} of the suite's {board.abouts[0]['suite_size']} tasks. {not_run(board)}{history(board)}",
                f"Speed-up: steps in which the tuned {REFERENCE} reaches its best smoothed loss, over the steps that "
                "another optimizer takes to reach that loss; 0 if it never does. Tuned means at a cost of dozens of "
                f"runs; untuned rows took one. {REFERENCE} tuned for T/2 and T/3 shows what a shorter schedule alone "
                "earns; “once” is one setting for all tasks, chosen on these very tasks: what one setting can reach, "
                "not what a user would have. "
                "Intervals are of 95 % over seeds on these tasks. Click on a column to sort.",
            ],
            tables=[_totals([*sorted(totals, key=_by_rank), *controls[1:]])],
        ),
        Section("Speed-up", [], [drawing.bars([*totals, *controls[1:]])]),
        Section(
            "Budgets of tuning",
            [
                "What the defaults (1 trial), ten points drawn from the grid (10 trials) and the whole grid reach, by "
                f"validation loss. Wins are over the fully tuned {REFERENCE}, ranks among those of the same budget. "
                "Ten of a large grid are a smaller share of it than ten of a small one: the points say of how many. "
                f"Critical difference of ranks: {_difference(within)}. "
                "The profiles are those of 1 trial, 10 trials and the whole grid, in this order."
            ],
            [
                drawing.profiles(ran, RATIOS, standings.profile(board, ran, RATIOS), ran[:MOST], budget)
                for budget, ran in per_budget.items()
                if ran
            ],
            [_budgets(found)],
        ),
        Section(
            "Performance profile",
            [
                f"Share of the {len(names)} tasks on which an optimizer reaches the tuned {REFERENCE}'s best "
                "validation loss in at most τ times the steps of the fastest one (Dolan and Moré). Grey: the others."
            ],
            [drawing.profiles(labels, RATIOS, shares, shown)],
            [_profile(labels, shares)],
        ),
        Section(
            "Ranks",
            [
                "By final validation loss on each task and seed. Mean ranks that differ by less than the critical "
                f"difference (Nemenyi, 5 %), {_difference(difference)} here, are not told apart by "
                "so few tasks. An optimizer takes part once: without rows “once” and, beside random searches, without "
                "what a grid or fewer trials found."
            ],
            [drawing.rank_plot(in_ranks, difference)],
        ),
    ]
    return out + [_problem(board, problem.name, shown) for problem in board.problems]


def _difference(difference: float) -> str:
    return f"{difference:.1f}" if math.isfinite(difference) else "none"


def _profile(labels: Sequence[str], shares: np.ndarray) -> Table:
    """Some points of the profile in numbers."""
    at = [int(np.argmin(np.abs(np.log(RATIOS / tau)))) for tau in TAUS]
    rows = [(Cell(label), *(number(float(share[i])) for i in at)) for label, share in zip(labels, shares, strict=True)]
    return Table(("optimizer", *(f"share solved, τ = {tau:g}" for tau in TAUS)), rows)


def _by_rank(total: Total) -> Any:
    return math.isnan(total.rank), total.rank, total.label


def not_run(board: Board) -> str:
    """Which optimizers were not run on which problems, if there are any; totals are over the others."""
    out = []
    for problem in board.problems:
        without = [label for label in board.labels() if label not in board.rows[problem.name]]
        if without:
            out.append(f"on {problem.name} {'; '.join(without)}")
    skipped = {
        f"{row.label} ({row.error})" for rows in board.rows.values() for row in rows.values() if row.status == "skipped"
    }
    words = f"What follows is over the tasks on which all were run; not run: {' – '.join(out)}. " if out else ""
    if void := [problem.name for problem in board.problems if not board.scores[problem.name]]:
        words += f"Not in the totals, since the tuned {REFERENCE} did not end there: {', '.join(void)}. "
    if skipped:
        words += f"Not in the totals, since skipped on a task: {', '.join(sorted(skipped))}. "
    return words


def _met(board: Board) -> dict[str, Any]:
    """Optimizer of a row -> families and data of its meta-training; None where not known.

    Without those that have none: hand-designed ones with nothing to tune.
    """
    said = {name: met for about in board.abouts for name, met in about.get("met", {}).items()}
    rows = [row for rows in board.rows.values() for row in rows.values() if row.budget == "untuned"]
    found = {row.optimizer: said.get(row.optimizer.split(" (")[0]) for row in rows}
    return {name: one for name, one in found.items() if one is None or one["families"]}


def history(board: Board) -> str:
    """Of which optimizers it is known that what is said to be never met was not."""
    met = _met(board)
    known, unknown = [name for name, one in met.items() if one], [name for name, one in met.items() if not one]
    words = f"What tasks say of data and families “never met” was checked for {', '.join(known)}. " if known else ""
    if unknown:
        words += f"It is not known, and may be wrong, for {', '.join(unknown)}. "
    return words


def _overlaps(board: Board, problem: Any) -> list[str]:
    """Who met the problem's data or family in meta-training."""
    out = []
    sources = {source for row in board.rows[problem.name].values() for source in row.sources}
    for name, met in _met(board).items():
        shared = sorted(sources & set(met["data"])) if met else []
        if met and problem.family in met["families"] and "family" in problem.note:
            shared.append(f"the family {problem.family}")
        if shared:
            out.append(f"{name} has met {' and '.join(shared)} in meta-training.")
    return out


def _totals(totals: Sequence[Total]) -> Table:
    header = (
        "optimizer", "speed-up, validation (IQM)", "median", "speed-up, training (IQM)",
        "in time, validation (IQM)", "win rate, validation", "mean rank, validation", "win rate, test",
        "mean rank, test", "diverged", "crashed, tasks", "not run, tasks", "ms a step / AdamW",
        "state, bytes a parameter",
    )  # fmt: skip
    rows = [
        (
            Cell(t.label),
            times(t.iqm["validation"], t.interval["validation"]),
            times(t.median["validation"], t.median_interval["validation"]),
            times(t.iqm["train"], t.interval["train"]),
            times(t.wall, t.wall_interval),
            share(t.win, t.win_interval),
            rank(t.rank, t.rank_interval),
            share(t.test_win, t.test_win_interval),
            rank(t.test_rank, t.test_rank_interval),
            Cell(f"{100 * t.diverged:.0f} %" if math.isfinite(t.diverged) else "–", t.diverged),
            Cell(str(t.failed), t.failed),
            Cell(str(t.missing), t.missing),
            number(t.relative_ms),
            number(t.state_bytes),
        )
        for t in totals
    ]
    return Table(header, rows)


def _budgets(found: Sequence[Budget]) -> Table:
    header = (
        "optimizer", "budget", "points", "speed-up (IQM)", "median", "win rate", "mean rank", "win rate, test",
        "mean rank, test",
    )  # fmt: skip
    rows = [
        (
            Cell(one.optimizer),
            Cell(one.budget),
            Cell(one.points),
            times(one.total.iqm["validation"], one.total.interval["validation"]),
            times(one.total.median["validation"], one.total.median_interval["validation"]),
            share(one.total.win, one.total.win_interval),
            rank(one.total.rank, one.total.rank_interval),
            share(one.total.test_win, one.total.test_win_interval),
            rank(one.total.test_rank, one.total.test_rank_interval),
        )
        for one in found
    ]
    return Table(header, rows)


def _problem(board: Board, name: str, shown: Sequence[str]) -> Section:
    problem = next(p for p in board.problems if p.name == name)
    found, rows = board.scores[name], board.rows[name]
    measured = sorted({metric for row in rows.values() for metric in row.test if metric != "loss"})
    header = [
        "optimizer", "final validation loss", "best", "final training loss", "best", "test loss",
        *(f"test {metric}" for metric in measured), "speed-up, validation", "speed-up, training", "in time, validation",
        "diverged", "ms a step", "state, bytes", "chosen for validation", "chosen for training",
    ]  # fmt: skip
    lines = []
    for row in rows.values():
        score = found.get(row.label)
        if score is None:
            failed = Cell(f"{row.status}: {row.error}"[:160], math.inf)
            lines.append([Cell(row.label), failed, *[Cell("–")] * (len(header) - 2)])
            continue
        timing = board.timing.get(name, {}).get(row.optimizer, {})
        lines.append(
            [
                Cell(row.label),
                spread(score.final["validation"]),
                spread(score.best["validation"]),
                spread(score.final["train"]),
                spread(score.best["train"]),
                spread(row.test["loss"]),
                *(
                    spread(row.test[metric], percent=metric == "accuracy") if metric in row.test else Cell("–")
                    for metric in measured
                ),
                hit(score.hit["validation"], score.speed_up["validation"]),
                hit(score.hit["train"], score.speed_up["train"]),
                times(score.wall["validation"]),
                Cell(f"{100 * score.diverged:.0f} %", score.diverged),
                number(timing.get("ms", math.nan)),
                Cell(f"{timing['state_bytes']:,}", timing["state_bytes"]) if timing else Cell("–"),
                Cell(_chosen(row, "validation")),
                Cell(_chosen(row, "train")),
            ]
        )
    lines.sort(key=lambda line: (math.inf if math.isnan(line[1].value) else line[1].value, line[0].text))
    figures = [drawing.curves(board, name, found, shown)] if shown else []
    return Section(
        f"{name}: {problem.describe()}",
        [" ".join([f"{problem.note}.", *_overlaps(board, problem)])],
        figures,
        [Table(header, lines)],
    )


def _chosen(row: standings.Row, split: str) -> str:
    if not row.chosen:
        return "untuned"
    point, edges = row.chosen[split], row.edge.get(split, ())
    words = [
        f"{key} {value:.4g}{' (at the edge of the grid)' * (key in edges)}" for key, value in point["hyper"].items()
    ]
    return ", ".join([*words, point["schedule"]])


def environment(board: Board) -> list[tuple[str, str]]:
    """What the numbers come from: commands, machine, versions, hashes."""
    out = []
    for about in board.abouts:
        machine = about["machine"]
        out += [
            ("command", about["command"]),
            ("date", f"{about['date']}, {about['wall_seconds']:.0f} s"),
            ("suite, seeds", f"{about['suite']}, {about['seeds']}"),
            ("machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['platform']}"),
            ("versions", f"Python {machine['python']}, JAX {machine['jax']}, optax {machine['optax']}"),
            ("lopt", f"{machine.get('lopt', 'unknown')}, commit {machine.get('commit') or 'unknown'}"),
            ("steps timed", _timed(about)),
            ("records", f"{len(about['cells'])}, sha256 of their keys {digest(about['cells'])}"),
            ("records made with", "; ".join(about.get("made_with", ())) or "unknown"),
        ]
    for name, met in _met(board).items():
        words = "meta-trained on: unknown"
        if met:
            words = f"meta-trained on: {', '.join(met['families'])}; data: {', '.join(met['data']) or 'none'}"
        out.append((name, words))
    return out


def _timed(about: Mapping[str, Any]) -> str:
    """When and where the milliseconds a step were measured, which --no-timing leaves as they were."""
    timed = about.get("timed") or {}
    if not timed.get("date"):
        return "never" if "timed" not in about else "unknown"
    return f"{timed['date']}, {timed['machine']['cpu']}, {timed['machine']['cores']} cores"


def digest(names: Sequence[str]) -> str:
    """One hash of all cells' keys: equal if two runs rest on the same inputs."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]


NOTES = (
    "Definitions, formulas and their sources: docs/evaluation.md. Paired: a seed fixes data, initial weights and every "
    "minibatch for all optimizers alike. Tuned on other seeds than those reported; learning rate, schedule and weight "
    "decay chosen on validation loss (for the training columns on training loss, but for “once”, 1 trial and 10 "
    "trials, which have one setting for both). ms a step: one run alone, at the date below. "
    "Bands: least to largest of the seeds; dashed line: the target."
)


def as_html(title: str, parts: Sequence[Section], about: Sequence[tuple[str, str]]) -> str:
    """One file that opens by a double click."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    links = "".join(f'<li><a href="#s{i}">{html.escape(part.title)}</a></li>' for i, part in enumerate(parts))
    body.append(f"<details><summary>Contents</summary><ul>{links}</ul></details>")
    for i, part in enumerate(parts):
        body.append(f'<h2 id="s{i}">{html.escape(part.title)}</h2>')
        body += [f"<p>{html.escape(text)}</p>" for text in part.text]
        body += [f"<figure>{figure}</figure>" for figure in part.figures]
        body += [_html_table(table) for table in part.tables]
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in about)
    body += ["<h2>Where this comes from</h2>", f'<div class="scroll"><table class="about">{rows}</table></div>']
    body.append(f"<p>{html.escape(NOTES)}</p>")
    return _PAGE.replace("TITLE", html.escape(title)).replace("BODY", "\n".join(body))


def _html_table(table: Table) -> str:
    head = "".join(f'<th><button type="button">{html.escape(name)}</button></th>' for name in table.header)

    def cell(one: Cell) -> str:
        value = f' data-v="{one.value:.6g}"' if not math.isnan(one.value) else ""
        return f"<td{value}>{html.escape(one.text)}</td>"

    rows = "".join("<tr>" + "".join(map(cell, row)) + "</tr>\n" for row in table.rows)
    return (
        f'<div class="scroll"><table class="sort"><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>'
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title><style>
body{font:15px/1.45 system-ui,sans-serif;color:#111;background:#fff;margin:0 auto;max-width:70rem;padding:0 .8rem 3rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem;border-top:1px solid #bbb;padding-top:.8rem}
p{max-width:48rem}figure{margin:.5rem 0;max-width:56rem;overflow-x:auto}
figure svg{width:100%;min-width:30rem;height:auto}
.scroll{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;font-size:.82rem;font-variant-numeric:tabular-nums}
td,th{padding:.22rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left;position:sticky;left:0;background:#fff}
.sort thead th{border-bottom:2px solid #111;vertical-align:bottom;white-space:normal;min-width:4.5rem}
.sort td:last-child:not([data-v]){text-align:left}
.about th,.about td{text-align:left;white-space:normal;font-weight:400}
th button{font:inherit;font-weight:600;background:none;border:0;padding:0;cursor:pointer;
text-align:inherit;color:inherit}
th[aria-sort=ascending] button::after{content:" ▲"}th[aria-sort=descending] button::after{content:" ▼"}
tbody tr:hover td{background:#f2f2f2}
</style></head><body>
BODY
<script>
for(const table of document.querySelectorAll("table.sort"))table.tHead.addEventListener("click",e=>{
const th=e.target.closest("th");if(!th)return;const i=th.cellIndex,up=th.getAttribute("aria-sort")!=="ascending";
for(const x of table.tHead.rows[0].cells)x.removeAttribute("aria-sort");
th.setAttribute("aria-sort",up?"ascending":"descending");
const key=r=>r.cells[i].dataset.v===undefined?NaN:Number(r.cells[i].dataset.v);
const rows=[...table.tBodies[0].rows].sort((a,b)=>{const x=key(a),y=key(b);
if(isNaN(x)&&isNaN(y))return(up?1:-1)*a.cells[i].textContent.localeCompare(b.cells[i].textContent);
if(isNaN(x))return 1;if(isNaN(y))return-1;return up?x-y:y-x});
table.tBodies[0].append(...rows)});
</script></body></html>
"""


def as_markdown(title: str, parts: Sequence[Section], about: Sequence[tuple[str, str]]) -> str:
    """The same without figures."""
    out = [f"# {title}", ""]
    for part in parts:
        if not (part.tables or part.text):
            continue
        out += [f"## {part.title}", "", *(line for text in part.text for line in (text, ""))]
        for table in part.tables:
            out += [_markdown_line(table.header), "|:--" + "|--:" * (len(table.header) - 1) + "|"]
            out += [_markdown_line([cell.text for cell in row]) for row in table.rows] + [""]
    out += ["## Where this comes from", "", *(f"- {key}: `{value}`" for key, value in about), "", NOTES, ""]
    return "\n".join(out)


def _markdown_line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|").replace("*", "\\*") for text in texts) + " |"


def results_csv(board: Board) -> str:
    """One line a problem, row and split; numbers have six digits."""
    out = io.StringIO()
    tested = (
        "loss",
        *sorted({name for held in board.rows.values() for row in held.values() for name in row.test} - {"loss"}),
    )
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        (
            "problem",
            "num_steps",
            "optimizer",
            "split",
            "status",
            "final_mean",
            "final_std",
            "best_mean",
            "hit_step",
            "speed_up",
            "speed_up_in_time",
            "diverged",
            *(f"test_{name}" for name in tested),
            "ms",
            "state_bytes",
            "chosen",
        )
    )
    for problem in board.problems:
        found = board.scores[problem.name]
        for row in board.rows[problem.name].values():
            for split in ("validation", "train"):
                writer.writerow(
                    [
                        problem.name,
                        problem.num_steps,
                        row.label,
                        split,
                        *_csv_cells(board, problem, row, found, split, tested),
                    ]
                )
    return out.getvalue()


def _csv_cells(
    board: Board, problem: Any, row: standings.Row, found: dict[str, Score], split: Any, tested: Sequence[str]
) -> list[Any]:
    score = found.get(row.label)
    if score is None:
        return [row.status]
    timing = board.timing.get(problem.name, {}).get(row.optimizer, {})
    final = score.final[split]
    values: list[Any] = [final.mean(), final.std(ddof=1) if len(final) > 1 and np.isfinite(final).all() else math.nan]
    values += [score.best[split].mean(), score.hit[split], score.speed_up[split], score.wall[split], score.diverged]
    # The test set was looked at with what was chosen on validation loss.
    same = row.chosen.get(split) == row.chosen.get("validation")
    values += [row.test[name].mean() if name in row.test and same else math.nan for name in tested]
    chosen = row.chosen.get(split)
    texts = [f"{k}={v:.6g}" for k, v in chosen["hyper"].items()] + [chosen["schedule"]] if chosen else []
    numbers = ["" if v is None or not math.isfinite(v) else f"{v:.6g}" for v in values]
    return [row.status, *numbers, timing.get("ms", ""), timing.get("state_bytes", ""), " ".join(texts)]


def summary_csv(totals: Sequence[Total], before: Sequence[Mapping[str, Any]] = ()) -> str:
    """One line an optimizer; `before` are further columns of each."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for at, total in enumerate(totals):
        flat: dict[str, Any] = dict(before[at]) if before else {}
        for key, value in total._asdict().items():
            parts = value.items() if isinstance(value, dict) else [("", value)]
            for name, one in parts:
                column = f"{key}_{name}".strip("_")
                flat |= {f"{column}_low": one[0], f"{column}_high": one[1]} if isinstance(one, tuple) else {column: one}
        if not at:
            writer.writerow(flat)
        writer.writerow(
            [
                f"{v:.6g}" if isinstance(v, float) and math.isfinite(v) else "" if isinstance(v, float) else v
                for v in flat.values()
            ]
        )
    return out.getvalue()


def files(board: Board, totals: Sequence[Total]) -> dict[str, str]:
    """The report's files by name; totals are those of all labels."""
    title = f"Optimizers on {board.abouts[0]['suite']}"
    found, keys = standings.budgets(board), ("optimizer", "budget", "points")
    parts, about = sections(board, totals, found), environment(board)
    contents = (
        as_html(title, parts, about),
        as_markdown(title, parts, about),
        results_csv(board),
        summary_csv(totals),
        summary_csv([one.total for one in found], [dict(zip(keys, one[:3], strict=True)) for one in found]),
    )
    return dict(zip(FILES, contents, strict=True))
