"""L2O-PA on random logistic regression with an l1 penalty, 100 × 20: as l2o_lasso, with softplus for p and a.

lopt-train l2o_logistic
"""

import dataclasses

from meta_train.config import Group, load

LASSO = load("l2o_lasso")
RUN = dataclasses.replace(
    LASSO,
    name="l2o_logistic",
    rule_settings={"activation": "softplus", "a_gain": 0.3},
    groups=(Group("logistic_l1"),),
    validation=dataclasses.replace(LASSO.validation, tasks=(Group("logistic_l1"),)),
    meta_optimizer=dataclasses.replace(LASSO.meta_optimizer, lr=3e-3),
)
