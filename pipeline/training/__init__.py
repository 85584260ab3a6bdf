"""Training: one optimiser step, batches, the loop, the plan, worker processes. Tensors only."""
