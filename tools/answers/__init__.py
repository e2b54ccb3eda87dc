"""What `tools/generate.py` and `tools/evaluate.py` share: their options, and the page of an evaluation."""
