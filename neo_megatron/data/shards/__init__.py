"""The shard format: writing, reading and checking tokenized samples and their images."""
