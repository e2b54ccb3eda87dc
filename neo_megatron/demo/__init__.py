"""The page of `neo-megatron demo`: questions about an image, and the attention of each word of the answer."""
