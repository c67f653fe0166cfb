"""Live sources against real servers, which die and come back. Minutes, and Debian packages: to be asked for by name."""
