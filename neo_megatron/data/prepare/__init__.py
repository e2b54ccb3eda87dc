"""Preprocessing: annotations and media to shards."""
