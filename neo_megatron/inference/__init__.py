"""Using a trained NEO: prompts, answers in batches and as streams, and their metrics."""
