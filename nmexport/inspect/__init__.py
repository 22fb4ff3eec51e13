"""Read-only answers about a machine, an artifact or a planned build."""  # noqa: A005
