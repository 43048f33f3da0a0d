"""Policy gradients on control problems. Source: Williams (1992), REINFORCE, doi:10.1007/BF00992696.

Cart-pole: Barto et al. (1983), doi:10.1109/TSMC.1983.6313077, equations as in Florian (2007) without friction; swing_up
is the same machine with its pole hanging at first. Pendulum: swing-up of a rod by a limited torque. All are integrated
by the semi-implicit Euler method.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from tasks.base import Split, Task
from tasks.space import INIT, Choice, LogInt, Widths
from tasks.supervised import (
    activation_named,
    init_layers,
    init_scales,
    mlp,
    require_init_scale,
    require_positive,
    split_key,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PRNGKeyArray

SPACE = {
    "environment": Choice(("swing_up", "pendulum", "cart_pole")),
    "hidden": Widths(0, 2, 8, 64),
    "activation": Choice(("tanh", "relu", "silu")),
    "episodes": LogInt(8, 64),
    "length": LogInt(50, 150),
    "spread": Choice((0.0, 0.2, 0.4)),
    "log10_init_scale": INIT,
}


class Environment(Protocol):
    """Rewards are in [0, 1]; a step is `(physics, state, action) -> state`, all with a leading axis of episodes."""

    @property
    def physics(self) -> tuple[float, ...]: ...  # nominal values
    @property
    def features(self) -> int: ...  # of an observation
    @property
    def outputs(self) -> int: ...  # of the policy
    def start(self, key: PRNGKeyArray, episodes: int) -> Float[Array, "B S"]: ...
    def observe(self, state: Float[Array, "B S"]) -> Float[Array, "B F"]: ...
    def act(self, key: PRNGKeyArray, out: Float[Array, "B O"]) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """Actions and the logarithms of their probabilities."""
        ...

    def step(self, physics: Float[Array, " P"], state: Array, action: Float[Array, " B"]) -> Float[Array, "B S"]: ...
    def reward(self, state: Float[Array, "B S"]) -> Float[Array, " B"]: ...


def accelerations(
    physics: Float[Array, " 4"], angle: Float[Array, " B"], spin: Float[Array, " B"], action: Float[Array, " B"]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Of a cart in m/s², and of the pole on it in rad/s²; the angle is that from upright."""
    gravity, mass, length, force = physics
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    push = (force * action + mass * length * spin**2 * sin) / (1 + mass)
    around = (gravity * sin - cos * push) / (length * (4 / 3 - mass * cos**2 / (1 + mass)))
    return push - mass * length * around * cos / (1 + mass), around


class CartPole:
    """A pole on a cart that is pushed left or right. Reward 1 while it stands; once fallen it stays fallen."""

    physics = (
        9.8,
        0.1,
        0.5,
        10.0,
    )  # gravity m/s², pole's mass over the cart's, half length m, force over mass N/kg
    features, outputs = 4, 2
    seconds, most_x, most_angle = 0.02, 2.4, math.radians(12)

    def start(self, key: PRNGKeyArray, episodes: int) -> Float[Array, "B 5"]:
        """Position, velocity, angle, angular velocity, and 1 while the pole stands."""
        state = jax.random.uniform(key, (episodes, 4), minval=-0.05, maxval=0.05)
        return jnp.concatenate([state, jnp.ones((episodes, 1))], axis=-1)

    def observe(self, state: Float[Array, "B 5"]) -> Float[Array, "B 4"]:
        return state[:, :4] / jnp.array([1.0, 1.0, 0.1, 1.0], state.dtype)[None]

    def act(self, key: PRNGKeyArray, out: Float[Array, "B 2"]) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        log_probs = jax.nn.log_softmax(out)
        right = jax.random.bernoulli(key, jnp.exp(log_probs[:, 1]))
        return (2.0 * right - 1.0).astype(out.dtype), jnp.where(right, log_probs[:, 1], log_probs[:, 0])

    def step(self, physics: Float[Array, " 4"], state: Float[Array, "B 5"], action: Array) -> Float[Array, "B 5"]:
        x, velocity, angle, spin, alive = state.T
        along, around = accelerations(physics, angle, spin, action)
        velocity, spin = velocity + self.seconds * along, spin + self.seconds * around
        x, angle = x + self.seconds * velocity, angle + self.seconds * spin
        alive = alive * ((jnp.abs(x) < self.most_x) & (jnp.abs(angle) < self.most_angle))
        # A fallen pole is put away, so that its numbers stay small.
        return jnp.stack([x, velocity, angle, spin, jnp.ones_like(x)], axis=-1) * alive[:, None]

    def reward(self, state: Float[Array, "B 5"]) -> Float[Array, " B"]:
        return state[:, 4]


class Gaussian:
    """Actions in ±1: the policy's output plus normal noise, squashed."""

    outputs, std = 1, 0.5

    def act(self, key: PRNGKeyArray, out: Float[Array, "B 1"]) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        # The gradient is that of the density alone: what was drawn is a number.
        noise = self.std * jax.random.normal(key, out.shape[:1])
        drawn = jax.lax.stop_gradient(out[:, 0] + noise.astype(out.dtype))
        density = -0.5 * ((drawn - out[:, 0]) / self.std) ** 2 - math.log(self.std * math.sqrt(2 * math.pi))
        return jnp.tanh(drawn), density


class SwingUp(Gaussian):
    """A pole that hangs from a cart on a rail with ends; the reward is 1 where it stands at rest above the middle."""

    physics, features = CartPole.physics, 5
    seconds, most_x, most_spin = 0.04, 2.4, 15.0

    def start(self, key: PRNGKeyArray, episodes: int) -> Float[Array, "B 4"]:
        """Position, velocity, angle from upright and angular velocity."""
        unit = jax.random.uniform(key, (episodes, 4), minval=-1.0, maxval=1.0)
        return jnp.array([0.0, 0.0, jnp.pi, 0.0])[None] + unit * jnp.array([0.5, 0.1, 0.3, 0.1])[None]

    def observe(self, state: Float[Array, "B 4"]) -> Float[Array, "B 5"]:
        x, velocity, angle, spin = state.T
        return jnp.stack([x / self.most_x, velocity / 2, jnp.cos(angle), jnp.sin(angle), spin / 5], axis=-1)

    def step(self, physics: Float[Array, " 4"], state: Float[Array, "B 4"], action: Array) -> Float[Array, "B 4"]:
        x, velocity, angle, spin = state.T
        along, around = accelerations(physics, angle, spin, action)
        velocity = velocity + self.seconds * along
        spin = jnp.clip(spin + self.seconds * around, -self.most_spin, self.most_spin)
        moved = x + self.seconds * velocity
        x = jnp.clip(moved, -self.most_x, self.most_x)
        return jnp.stack([x, jnp.where(x == moved, velocity, 0.0), angle + self.seconds * spin, spin], axis=-1)

    def reward(self, state: Float[Array, "B 4"]) -> Float[Array, " B"]:
        x, _, angle, spin = state.T
        return 0.5 * (1 + jnp.cos(angle)) * (1 - 0.5 * (x / self.most_x) ** 2) / (1 + 0.05 * spin**2)


class Pendulum(Gaussian):
    """A rod that hangs at a random angle; the reward is 1 where it stands upright at rest, and no action costs any."""

    physics = (9.8, 1.0, 1.0)  # gravity m/s², length m, mass kg
    features = 3
    seconds, most_torque, most_spin = 0.05, 2.0, 8.0

    def start(self, key: PRNGKeyArray, episodes: int) -> Float[Array, "B 2"]:
        """Angle from upright and angular velocity."""
        unit = jax.random.uniform(key, (episodes, 2), minval=-1.0, maxval=1.0)
        return unit * jnp.array([jnp.pi, 1.0])[None]

    def observe(self, state: Float[Array, "B 2"]) -> Float[Array, "B 3"]:
        return jnp.stack([jnp.cos(state[:, 0]), jnp.sin(state[:, 0]), state[:, 1] / 4.0], axis=-1)

    def step(self, physics: Float[Array, " 3"], state: Float[Array, "B 2"], action: Array) -> Float[Array, "B 2"]:
        gravity, length, mass = physics
        angle, spin = state.T
        torque = self.most_torque * action
        turn = 3 * gravity / (2 * length) * jnp.sin(angle) + 3 * torque / (mass * length**2)
        spin = jnp.clip(spin + self.seconds * turn, -self.most_spin, self.most_spin)
        return jnp.stack([angle + self.seconds * spin, spin], axis=-1)

    def reward(self, state: Float[Array, "B 2"]) -> Float[Array, " B"]:
        return 0.5 * (1 + jnp.cos(state[:, 0])) / (1 + 0.1 * state[:, 1] ** 2)


ENVIRONMENTS: dict[str, Environment] = {
    "cart_pole": CartPole(),
    "pendulum": Pendulum(),
    "swing_up": SwingUp(),
}


class Phi(NamedTuple):
    """Task parameters."""

    physics: Float[Array, " P"]
    scale: Float[Array, " L"]  # multiplies weight matrix l at init


def surrogate(log_prob: Float[Array, "T B"], reward: Float[Array, "T B"]) -> Float[Array, ""]:
    """What has the policy gradient of minus the mean reward as its gradient.

    The advantage is the reward to come, less its mean over the other episodes, which leaves the gradient unbiased.

    Args:
      log_prob: of the action at t.
      reward: for the state the action led to.
    """
    steps, episodes = reward.shape
    to_go = jnp.cumsum(reward[::-1], axis=0)[::-1]
    others = (jnp.sum(to_go, axis=1, keepdims=True) - to_go) / max(episodes - 1, 1)
    return -jnp.sum(log_prob * jax.lax.stop_gradient(to_go - others)) / (steps * episodes)


def policy_gradient(
    *,
    environment: str = "swing_up",
    hidden: Sequence[int] = (16,),
    activation: str = "tanh",
    episodes: int = 32,
    length: int = 100,
    spread: float = 0.2,
    log10_init_scale: float = 0.0,
) -> Task:
    """1 minus the mean reward a step of a stochastic policy, by REINFORCE.

    Args:
      environment: swing_up, pendulum, or cart_pole, whose pole stands at first and which is soon solved.
      hidden: widths of the policy.
      activation: relu, gelu, silu or tanh.
      episodes: B; a batch is their first states.
      length: T, steps an episode.
      spread: each physical constant of phi is its nominal value times a uniform number in 1 ± this, < 1.
      log10_init_scale: each weight matrix is multiplied at init by 10**u, u uniform in ± this.

    Raises ValueError for an invalid setting, naming the valid ones.
    """
    if environment not in ENVIRONMENTS:
        raise ValueError(f"policy_gradient: environment, got {environment!r}; valid: {', '.join(ENVIRONMENTS)}.")
    require_positive("policy_gradient", "hidden", hidden)
    require_positive("policy_gradient", "episodes", [episodes])
    require_positive("policy_gradient", "length", [length])
    if not 0.0 <= spread < 1.0:
        raise ValueError(f"policy_gradient: spread, got {spread}; valid: 0 to below 1.")
    require_init_scale("policy_gradient", log10_init_scale)
    world = ENVIRONMENTS[environment]
    activate, gain = activation_named("policy_gradient", activation)
    shapes = list(itertools.pairwise((world.features, *hidden, world.outputs)))

    def sample(key: PRNGKeyArray) -> Phi:
        nominal = jnp.array(world.physics)
        physics = nominal * jax.random.uniform(key, nominal.shape, minval=1 - spread, maxval=1 + spread)
        return Phi(physics, init_scales(key, len(shapes), log10_init_scale))

    def roll(params: Any, key: PRNGKeyArray, phi: Phi, batch: Float[Array, "B S"]) -> tuple[Array, Array]:
        """Log-probabilities and rewards, [T, B] each."""

        def step(state: Array, key: PRNGKeyArray) -> tuple[Array, tuple[Array, Array]]:
            action, log_prob = world.act(key, mlp(params, world.observe(state), activate))
            state = world.step(phi.physics, state, action)
            return state, (log_prob, world.reward(state))

        return jax.lax.scan(step, batch, jax.random.split(key, length))[1]

    def objective(params: Any, key: PRNGKeyArray, phi: Phi, batch: Array) -> tuple[Array, Array]:
        log_prob, reward = roll(params, key, phi, batch)
        return surrogate(log_prob, reward), 1 - jnp.mean(reward)

    def value_and_grad(params: Any, key: PRNGKeyArray, phi: Phi, batch: Array) -> tuple[Array, Any]:
        grads, value = jax.grad(objective, has_aux=True)(params, key, phi, batch)
        return value, grads

    def batch(key: PRNGKeyArray, phi: Phi, data: Any, split: Split) -> Float[Array, "B S"]:
        return world.start(split_key(key, split), episodes)

    wide = f", init 10^±{log10_init_scale:g}" if log10_init_scale else ""
    return Task(
        data=(),
        sample=sample,
        init=lambda key, phi: init_layers(key, shapes, phi.scale, gain),
        batch=batch,
        loss=lambda params, key, phi, batch: objective(params, key, phi, batch)[1],
        value_and_grad=value_and_grad,
        name=f"policy_gradient({environment}, {'-'.join(map(str, hidden)) or 'linear'}, {activation}, "
        f"{episodes} episodes of {length}, physics ± {spread:.0%}{wide})",
        version=3,  # another default environment
    )
