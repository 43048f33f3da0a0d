"""Estimators of the meta-gradient: `init(key, theta) -> state`, `estimate(key, theta, state) -> (Estimate, state)`.

They know `Inner` and nothing of rules or tasks. `REGISTRY` lists them; one paper, one file.
"""

from __future__ import annotations

REGISTRY: dict[str, str] = {
    "full_backprop": "meta_train.estimators.full_backprop",
    "full_es": "meta_train.estimators.full_es",
    "nres": "meta_train.estimators.nres",
    "pes": "meta_train.estimators.pes",
    "truncated_backprop": "meta_train.estimators.truncated_backprop",
    "truncated_es": "meta_train.estimators.truncated_es",
}
WHOLE_EPISODES = frozenset({"full_backprop", "full_es"})  # those that have no truncation
