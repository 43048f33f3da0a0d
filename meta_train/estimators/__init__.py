"""Estimators of the meta-gradient: `init(key, theta) -> state`, `estimate(key, theta, state) -> (Estimate, state)`.

They know `Inner` and nothing of rules or tasks. `REGISTRY` lists them; one paper, one file.
"""

from __future__ import annotations

REGISTRY: dict[str, str] = {"pes": "meta_train.estimators.pes"}
