"""The only package that patches Megatron or PyTorch; it checks version and source of what it replaces."""
