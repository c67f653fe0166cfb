"""Compiling for accelerators that are not here (extra `aot`)."""

from jstream.accelerators import compile_without_devices

compile_without_devices()  # before libtpu is loaded
