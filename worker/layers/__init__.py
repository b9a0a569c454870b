"""Layers of a decoder: each holds one rank's packed weights and runs as backend ops on fixed buffers."""
