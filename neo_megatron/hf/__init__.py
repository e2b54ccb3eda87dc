"""What an exported checkpoint carries: configuration, modelling and processing code for transformers.

The files import torch, transformers, numpy, PIL and one another, so that they run in a directory of their own with
`trust_remote_code`.
"""
