"""Plans memory, traffic and time of a run from sizes and parallel layout alone: no GPU, no model, no torch."""
