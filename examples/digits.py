"""Train a small MLP on scikit-learn's digits with a pretrained optimizer: the loop anyone would write.

python examples/digits.py
"""

import jax
import jax.numpy as jnp
import optax

import lopt
from tasks.data import load

STEPS, BATCH = 500, 64
digits = load("digits")
x = jnp.asarray(digits.x.reshape(len(digits.x), -1))
y = jnp.asarray(digits.y)
train, validation = (slice(*digits.splits[split]) for split in ("train", "validation"))


def init(key):
    first, second = jax.random.split(key)
    return {
        "hidden": {"w": jax.random.normal(first, (64, 32)) / 8, "b": jnp.zeros(32)},
        "output": {"w": jax.random.normal(second, (32, 10)) / 6, "b": jnp.zeros(10)},
    }


def logits(params, x):
    h = jax.nn.relu(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return h @ params["output"]["w"] + params["output"]["b"]


def loss_fn(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


tx = lopt.load("lopt-base", num_steps=STEPS)
params = init(jax.random.key(0))
state = tx.init(params)


@jax.jit
def step(params, state, key):
    rows = jax.random.randint(key, (BATCH,), train.start, train.stop)
    loss, grads = jax.value_and_grad(loss_fn)(params, x[rows], y[rows])
    updates, state = tx.update(grads, state, params, value=loss)
    return optax.apply_updates(params, updates), state, loss


for i, key in enumerate(jax.random.split(jax.random.key(1), STEPS)):
    params, state, loss = step(params, state, key)
    if (i + 1) % 100 == 0:
        held_out = loss_fn(params, x[validation], y[validation])
        accuracy = jnp.mean(jnp.argmax(logits(params, x[validation]), -1) == y[validation])
        print(f"step {i + 1}: training {loss:.4f}, validation {held_out:.4f}, accuracy {accuracy:.3f}")
