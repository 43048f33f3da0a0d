"""The record of a run: metrics.jsonl, a line for each step at which something was measured, and TensorBoard events."""

from __future__ import annotations

import json
from pathlib import Path

from lopt.console import write_whole


class Log:
    """metrics.jsonl, the record, and TensorBoard events, a view of it."""

    def __init__(self, folder: Path, after: int):
        """Cut the record back to meta-step `after`: later ones will be run again."""
        from tensorboardX import SummaryWriter

        self._path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= after]
        self.steps = {int(line["step"]) for line in kept}  # of the lines that were there
        write_whole(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)

    def write(self, line: dict[str, float]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if name != "step":
                self._events.add_scalar(name, value, int(line["step"]))

    def close(self) -> None:
        self._events.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Whole lines of a run's metrics.jsonl; one that a kill cut short, or that is damaged, is left out."""
    path = folder / "metrics.jsonl"
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "step" in line and all(isinstance(x, int | float) for x in line.values()):
            lines.append(line)
    return lines
