"""Whole training runs in several processes: minutes, and no part of the short suite."""
