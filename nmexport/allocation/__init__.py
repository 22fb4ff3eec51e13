"""Which linears are sparse, how sparse, and when: chosen under a budget, from measured costs."""
