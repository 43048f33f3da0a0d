"""The classical rule by lopt_base's budget, for comparison.

lopt-train small_fc
"""

import dataclasses

from meta_train.config import load

RUN = dataclasses.replace(load("lopt_base"), name="small_fc", rule="small_fc", rule_settings={})
