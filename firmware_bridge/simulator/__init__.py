"""A charger (or charger and meter) that answers on a real wire, with physics, laid out by the same maps the
driver reads.
"""

from firmware_bridge.simulator.plant import Plant, PlantConfig
from firmware_bridge.simulator.server import AlsoDevice, Simulator, SimulatorConfig, Truth

__all__ = ["AlsoDevice", "Plant", "PlantConfig", "Simulator", "SimulatorConfig", "Truth"]
