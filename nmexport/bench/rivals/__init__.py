"""Ours beside what else runs the same shapes on the same GPU; a rival is one class in one file."""
