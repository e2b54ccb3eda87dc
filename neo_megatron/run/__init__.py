"""Everything around Megatron's training loop: flags, resuming, checkpoints, logging, stopping, and the dry run."""
