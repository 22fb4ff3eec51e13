"""Which linears become sparse, how sparse, and when: chosen under a budget, from measured costs.

- `costs`: what each site may become, and what that costs in accuracy;
- `prices`: what it reads, and how long it takes;
- `probe`: trials of sites in the running model;
- `solve`: the choice as an integer programme;
- `study`: every site's options in figures, and joint models;
- `front`: quantisation alone, sparsity alone, and both;
- `choosing`: the choice under a budget;
- `ledger`: what every linear could have been, and why it became what it is;
- `built`: the choice once built, and choosing again;
- `allocate`: all of it, in order.
"""
