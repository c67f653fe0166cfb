"""The live server as its own process, and against clients that mean no good. Minutes; to be asked for by name."""
