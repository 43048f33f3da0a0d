"""L2O-DM on random LASSO, 20 × 40: a learned rule without structure by the budget of l2o_lasso, to compare with.

lopt-train l2o_lasso_dm
"""

import dataclasses

from meta_train.config import load

RUN = dataclasses.replace(load("l2o_lasso"), name="l2o_lasso_dm", rule="l2o_dm")
