"""Heads: what each kind computes, the frozen head that a fit returns, its training objective and its metrics."""
