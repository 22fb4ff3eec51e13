"""Measurements of speed: kernels, engines, and a server under load."""
