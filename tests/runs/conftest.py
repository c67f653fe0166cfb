"""Whole training runs, several processes, every way to compute a step: minutes, and no part of the short suite."""
