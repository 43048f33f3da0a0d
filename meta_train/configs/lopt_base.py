"""The recommended optimizer: six groups of tasks, of which most are not fitted within their horizon.

    lopt-train lopt_base        # 1,000 meta-steps, 4.8 million inner steps

The rule `tiny` with a learned length and decay of each tensor and directions of matrices made orthogonal. Images (with
a fifth of the labels noise in one group), autoencoders, a CNN, a GRU and a transformer on text; losses of the last 250
steps over about what a tuned AdamW reaches, so that kinds of tasks weigh alike. docs/recipes.md says what it was chosen
among. The resulting weights are in checkpoints/lopt-base.
"""

from meta_train.config import Estimator, Group, Horizon, MetaOptimizer, Run

IMAGES, TEXT = {"data": ["digits", "mnist5k"], "size": 8}, {"data": "kjv", "width": 32, "batch_size": 16}
NOISY = [["noise_labels", {"share": 0.2}]]
SCALE = {"log10_init_scale": 0.3}  # per tensor, up or down

RUN = Run(
    name="lopt_base",
    rule="tiny",
    rule_settings={
        "pace": 8,
        "pace_gain": 10.0,
        "step_mult": 0.024,
        "decay": 0.15,
        "fan_in": 1.0,
        "min_rms": 0.2,
        "newton_schulz": True,
        "average": 8.0,
        "longest": 1000.0,
        "largest": 5.0,
        "small": 0.1,
        "spared": 0.7,
    },
    groups=(
        Group("image_mlp", {**IMAGES, "hidden": [32], "log10_init_scale": 0.5}, 0.5, 0.35),
        Group("image_mlp", {**IMAGES, **SCALE, "hidden": [48, 48], "augment": NOISY}, 0.5, 0.40),
        Group("autoencoder", {**IMAGES, **SCALE, "hidden": [32], "code": 8}, 1.5, 0.186),
        Group("cnn", {**IMAGES, **SCALE, "channels": [4, 8], "batch_size": 32}, 0.5, 0.346),
        Group("rnn_lm", {**TEXT, **SCALE, "embedding": 16, "length": 12}, 1.5, 2.2),
        Group("transformer_lm", {**TEXT, **SCALE, "depth": 1, "length": 16, "batch_size": 8}, 1.5, 2.2),
    ),
    estimator=Estimator("nres", pairs=8, std=0.01, truncation=50),
    horizon=Horizon(250, 1000),
    meta_loss="validation",
    objective="last",
    last_steps=250,
    normalise="reference",
    loss_limit=8.0,
    meta_optimizer=MetaOptimizer(lr=2e-3, final_lr=1e-5, warmup=30, clip=1.0, ema=0.99, settings={"b1": 0.95}),
    meta_steps=1000,
    checkpoint_every=100,
)
