"""Stage artifacts on disk: folders, manifests, tensors, the list of sparse linears."""
