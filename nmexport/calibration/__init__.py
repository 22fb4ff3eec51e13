"""Text in, statistics out: corpora, streaming observers, the passes that gather what folding needs."""
