"""From annotations to tensors: preprocessing, shards, packs and the PyTorch data set."""
