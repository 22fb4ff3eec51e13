"""OpenAI's API over the same scheduler that answers Triton's requests."""
