"""Text from a model, token by token: one tokenizer, sampler and loop for generate, serve, tasks.

Nothing here imports torch or transformers: a server's Python has neither.
"""
