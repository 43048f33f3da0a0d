"""`python -m tasks`: what draws of each family vary, as docs/tasks.md has it."""

from __future__ import annotations

import importlib
from typing import Any

import jax

from tasks import REGISTRY, make
from tasks.space import Choice, Distribution, Widths

# Families whose SPACE has no `loss`, and the one that they have.
ONE_LOSS = {
    "es": "the other family's",
    "lasso": "squares and an l1 penalty, by definition",
    "logistic_l1": "logistic and an l1 penalty, by definition",
    "logistic_regression": "cross-entropy, by definition",
    "matrix_completion": "squares and a nuclear norm, by definition",
    "policy_gradient": "minus the return",
    "quadratic": "the quadratic",
    "rnn_lm": "cross-entropy of the next character",
    "structured_regression": "squares and the structure's penalty",
    "synthetic": "the function",
    "transformer_lm": "cross-entropy of the next character",
}


def table() -> str:
    """Markdown: of each family the settings that a seed draws, by its SPACE, and the parts of phi that a key draws."""
    lines = [
        "| family | `sample_settings`: by a seed, on the host | `Task.sample`: by a key, in phi |",
        "|---|---|---|",
    ]
    for family, module in sorted(REGISTRY.items()):
        space = importlib.import_module(module).SPACE
        settings = [_setting(entry) for entry in space.items()]
        settings += [f"one loss: {ONE_LOSS[family]}"] if "loss" not in space else []
        lines.append(f"| `{family}` | {'; '.join(settings)} | {_phi(family)} |")
    return "\n".join(lines)


def _setting(entry: tuple[str | tuple[str, ...], Distribution]) -> str:
    names, distribution = entry
    named = f"`{names}`" if isinstance(names, str) else ", ".join(f"`{name}`" for name in names)
    if isinstance(distribution, Choice):
        options = list(dict.fromkeys(map(_option, distribution.options)))
        return f"{named} {' or '.join(options)}"
    if isinstance(distribution, Widths):
        count = f"{distribution.shortest} to {distribution.longest}"
        return f"{named} {count} of {distribution.low} to {distribution.high}"
    return f"{named} {distribution.low:g} to {distribution.high:g}"


def _option(option: Any) -> str:
    if isinstance(option, tuple | list):
        return f"({', '.join(map(_option, option))})"
    if isinstance(option, dict):
        return ", ".join(f"{name} {_option(value)}" for name, value in option.items()) or "defaults"
    return f"{option:g}" if isinstance(option, float) else str(option)


def _phi(family: str) -> str:
    """Names of the parts of phi at the factory's defaults; a range in a setting adds that setting."""
    phi = jax.eval_shape(make(family).sample, jax.random.key(0))
    return ", ".join(name for name, part in phi._asdict().items() if jax.tree.leaves(part))


if __name__ == "__main__":
    print(table())
