"""`python -m firmware_bridge.simulator`: a simulated device without the agent's command line."""

import sys

from firmware_bridge.simulator.command import main

sys.exit(main())
