"""What a run does around the loop of Megatron: where it starts, its checkpoints, how it stops, a look ahead."""
