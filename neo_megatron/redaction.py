"""Keeps credentials out of the addresses of data sets, which are stored in manifests and printed.

What is printed and written otherwise goes through `redacted`. Needs nothing but the standard library.
"""

import re

from neo_megatron.errors import redacted

__all__ = ["credentials_refusal", "has_credentials", "redacted"]


def has_credentials(address: str) -> bool:
    """Whether an address of object storage has a user or a query; buckets and keys of objects need neither."""
    return re.search(r"://[^/\s]+@|\?[^/]*=", address) is not None


def credentials_refusal(address: str) -> str:
    """The sentence about such an address."""
    return (
        f"{redacted(address)} has credentials in it, which would be stored and printed: leave them out and set "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write them into the configuration of multi-storage-client"
    )
