"""µLO by lopt_base's budget: widths of 32 to 128 under the maximal-update parametrisation whose base is 32.

lopt-train mulo
"""

import dataclasses

from meta_train.config import Group, load

BASE = load("lopt_base")
IMAGES = {"data": ["digits", "mnist5k"], "size": 8}
TEXT = {"data": "kjv", "depth": 1, "length": 16, "batch_size": 8, "mup_base": 32}

RUN = dataclasses.replace(
    BASE,
    name="mulo",
    rule="mulo",
    rule_settings={"hidden": 8},
    groups=(
        *(
            Group("image_mlp", {**IMAGES, "hidden": [width] * 2, "mup_base": [32, 32]}, 1.0, 0.35)
            for width in (32, 64, 128)
        ),
        Group("transformer_lm", {**TEXT, "width": 32}, 1.5, 2.2),
        Group("transformer_lm", {**TEXT, "width": 64}, 1.5, 2.2),
    ),
)
