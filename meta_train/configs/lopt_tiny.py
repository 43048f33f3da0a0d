"""The recommended optimizer: `tiny` that sets its own pace, meta-trained on small images.

    make pretrain NAME=lopt-tiny

334 meta-parameters; docs/recipes.md has what else was tried.
"""

from meta_train.config import Estimator, Group, Horizon, MetaOptimizer, Run, Stage

IMAGES = {"data": ["digits", "mnist5k"], "size": 8, "log10_init_scale": 0.5}

RUN = Run(
    name="lopt_tiny",
    rule="tiny",
    rule_settings={"pace": 8},
    groups=(
        Group("image_mlp", {**IMAGES, "hidden": [32]}),
        Group("cnn", {**IMAGES, "channels": [4, 8], "batch_size": 16}),
    ),
    estimator=Estimator(pairs=8, std=0.01, truncation=50),
    horizon=Horizon(100, 500),
    stages=(Stage(2000, 100, 2000, 50),),
    meta_loss="validation",
    normalise="init",
    loss_limit=2.0,
    meta_optimizer=MetaOptimizer(settings={"b1": 0.95}, lr=1e-3, final_lr=1e-5, warmup=100, clip=1.0, ema=0.99),
    meta_steps=6000,
)
