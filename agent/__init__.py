"""The provider's on-board agent, and everybody's command lines. Start reading at `daemon.py`; decisions live in `core/`."""
