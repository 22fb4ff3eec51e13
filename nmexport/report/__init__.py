"""The report of a build: its schema, gates, pages and plots."""
