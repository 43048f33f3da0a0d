"""Nowcasting: predict future parameters of a run, around any optax optimizer.

Source: Knyazev et al. (2025), Accelerating Training with Neuron Interaction and Nowcasting Networks, arXiv:2409.04434.

    network = lopt.nowcast.read("my-nino")
    tx = lopt.nowcast.nino(optax.adamw(3e-3), network=network, graph=None, max_steps=10_000, loss_fn=held_out)
"""

from lopt.nowcast.builders import recognise
from lopt.nowcast.draw import draw
from lopt.nowcast.graph import Graph, View, view
from lopt.nowcast.network import Network, make
from lopt.nowcast.released import read, save
from lopt.nowcast.transform import Counts, Nowcaster, State, schedule
from lopt.nowcast.wrapper import linefit, nino, wnn

__all__ = [
    "Counts",
    "Graph",
    "Network",
    "Nowcaster",
    "State",
    "View",
    "draw",
    "linefit",
    "make",
    "nino",
    "read",
    "recognise",
    "save",
    "schedule",
    "view",
    "wnn",
]
