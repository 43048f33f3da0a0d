"""lopt_base's recipe for updates that cost a tenth as much: directions of matrices are not made orthogonal.

lopt-train lopt_tiny

The resulting weights are in checkpoints/lopt-tiny.
"""

import dataclasses

from meta_train.config import load

BASE = load("lopt_base")
RUN = dataclasses.replace(BASE, name="lopt_tiny", rule_settings=BASE.rule_settings | {"newton_schulz": False})
