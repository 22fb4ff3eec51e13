"""The command line: options to a recipe, one call, an exit code."""
