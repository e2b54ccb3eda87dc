"""Code that an exported checkpoint carries: configuration, model and processor for transformers.

The files import torch, transformers, numpy, PIL and one another, so that they run in a directory of their own with
`trust_remote_code`.
"""
