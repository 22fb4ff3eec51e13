"""The method in torch, with no input or output: patterns, criteria, masks, mitigations, modules."""
