"""Text in, statistics out: corpora, streaming observers, the passes that feed folding."""
