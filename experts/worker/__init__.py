"""A process that holds experts and computes them, and keeps nothing of a request."""
