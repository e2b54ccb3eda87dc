"""Using a trained NEO: prompts, answers in batches and as streams, and how right they are."""
