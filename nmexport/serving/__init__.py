"""Serving: many requests in flight on one model, and the Triton repository that holds it.

Nothing here imports torch or transformers: a server's environment needs neither.
"""
