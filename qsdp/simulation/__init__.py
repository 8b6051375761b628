"""Training of N ranks in one process, with the numbers of the wire and without the wire."""

from __future__ import annotations

from qsdp.simulation.make_simulation import simulate as simulate
from qsdp.simulation.training import Simulation as Simulation
from qsdp.simulation.volume import SimulatedVolume as SimulatedVolume
