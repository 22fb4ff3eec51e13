"""Accuracy, parity, latency, gates, and the report that shows them."""
