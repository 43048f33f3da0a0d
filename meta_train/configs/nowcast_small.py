"""NiNo's graph network and its graph-free one, small, on eight kinds of small tasks under Adam and AdamW.

    lopt-train nowcast_small

Records 128 trajectories of up to 10,000 steps, then trains both networks (width 32, two layers of message passing) on
the same windows; the best by real steps-to-target on two other tasks is exported. No data set or family that
tasks.HELD_OUT names is recorded. The resulting weights are in checkpoints/nino-small and
checkpoints/wnn-small.
"""

from meta_train.nowcast_config import Nowcasting, Problem, Recorded, Recording, Training, Validation

RUN = Nowcasting(
    name="nowcast_small",
    recording=Recording(
        groups=(
            Recorded("image_mlp", {"data": "digits", "hidden": [32], "batch_size": 32}),
            Recorded("image_mlp", {"data": "mnist5k", "hidden": [16, 16], "batch_size": 32}),
            Recorded("image_mlp", {"data": "mnist5k", "size": 14, "hidden": [16], "activation": "tanh"}, 5000),
            Recorded("cnn", {"data": "mnist5k", "size": 8, "channels": [8, 16], "batch_size": 32}, 5000),
            Recorded("autoencoder", {"data": "digits", "hidden": [24], "code": 8, "batch_size": 32}),
            Recorded("rnn_lm", {"data": "kjv", "width": 16, "embedding": 8, "length": 16, "batch_size": 8}, 5000),
            Recorded(
                "transformer_lm",
                {"data": "kjv", "width": 16, "depth": 1, "heads": 2, "length": 16, "batch_size": 8},
                5000,
                heads=2,
            ),
        ),
    ),
    validation=Validation(
        tasks=(
            Problem("image_mlp", {"data": "mnist5k", "size": 14, "hidden": [24, 24], "activation": "gelu"}, 1e-3),
            Problem("rnn_lm", {"data": "kjv", "width": 24, "embedding": 12, "length": 16, "batch_size": 16}, 1e-2),
        ),
    ),
    training=Training(steps=4000),
)
