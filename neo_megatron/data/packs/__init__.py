"""Packs of samples: best-fit packing, the held-out split, the balance between ranks, and the index of packs."""
