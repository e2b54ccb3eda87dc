"""What a run will need and cost, computed from sizes and layout alone: no GPU, no model, no torch."""
