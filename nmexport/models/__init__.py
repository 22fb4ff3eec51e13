"""Hugging Face models: finding, loading, swapping linears, tracing to ONNX."""
