"""The engine process: one model, one cache, one loop. `python -m router.engine FD` speaks router.messages on FD."""
