"""Everything on disk: artifacts and their manifests, the work directory, tensors, `layers.json`."""
