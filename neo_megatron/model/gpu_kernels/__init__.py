"""Operations of the model that are written for GPUs, in Triton; imported only where a GPU computes."""
