"""The last words of `make test`: where the results lie and how the shipped weights are used."""

import lopt

print(f"""results: runs/tests/junit.xml
use the weights:
  import lopt
  tx = lopt.load({lopt.available()[0]!r}, num_steps=1000)  # an optax transform: init, then one update a step
  updates, opt_state = tx.update(grads, opt_state, params, value=loss)""")
