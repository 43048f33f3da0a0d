"""Adam with hyper-parameters that an LSTM sets over time, learned by lopt_base's budget, for comparison.

lopt-train nn_adam

The resulting weights are in checkpoints/nn_adam.
"""

import dataclasses

from meta_train.config import load

RUN = dataclasses.replace(
    load("lopt_base"), name="nn_adam", rule="nn_adam", rule_settings={"lr0": 3e-3, "lstm_hidden": 8}
)
