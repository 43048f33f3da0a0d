"""The recommended optimizer: `tiny` that sets its own pace, meta-trained on small images and a table.

    make pretrain NAME=lopt-tiny

334 meta-parameters. Two of the three groups overfit, by labels that are noise and by few rows, and the meta-loss is
that of validation batches: without them the rule learns to be fast and then ruins what it has (docs/recipes.md).
"""

from meta_train.config import Estimator, Group, Horizon, MetaOptimizer, Run, Stage

IMAGES = {"data": ["digits", "mnist5k"], "size": 8, "log10_init_scale": 0.5}

RUN = Run(
    name="lopt-tiny",
    rule="tiny",
    rule_settings={"pace": 8},
    groups=(
        Group("image_mlp", {**IMAGES, "hidden": [32]}, 2.0),
        Group("image_mlp", {**IMAGES, "hidden": [48], "augment": [["noise_labels", {"share": 0.3}]]}),
        Group("tabular_regression", {"data": "wine", "hidden": [32], "batch_size": 32, "log10_init_scale": 0.5}, 0.5),
    ),
    estimator=Estimator(pairs=8, std=0.01, truncation=50),
    horizon=Horizon(100, 500),
    stages=(Stage(1500, 100, 1500, 50),),
    meta_loss="validation",
    normalise="init",
    loss_limit=2.0,
    meta_optimizer=MetaOptimizer(settings={"b1": 0.95}, lr=1e-3, final_lr=1e-5, warmup=100, clip=1.0, ema=0.99),
    meta_steps=4000,
)
