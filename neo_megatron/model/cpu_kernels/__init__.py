"""Operations of the model that are written for CPUs and run on no other device."""
