"""Checkpoints whose weights are stored as integers: what they hold, read bit for bit."""
