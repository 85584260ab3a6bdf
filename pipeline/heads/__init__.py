"""Heads: what each computes, what it is trained to minimise, how good it is."""
