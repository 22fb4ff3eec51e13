"""ONNX only: the op contract, function bodies, passes, checks. No torch here."""
