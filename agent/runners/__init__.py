"""ACT. The only long-lived tasks. Each owns one outside thing, handed to it by `daemon.py`; none knows another.

A runner looks at `engine.owed()` or at the book at its own beat, does what is owed, and tells the engine what it saw.
It is level-triggered: a missed wake-up, a crash and a reorg heal the same way.
"""
