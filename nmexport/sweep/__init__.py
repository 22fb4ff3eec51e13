"""Many recipes measured side by side, from one file."""
