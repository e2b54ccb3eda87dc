"""Rejects addresses of data sets that contain credentials, because manifests store them and logs print them.

All other output goes through `redacted`. Only the standard library is needed.
"""

import re

from neo_megatron.errors import redacted

__all__ = ["credentials_refusal", "has_credentials", "redacted"]


def has_credentials(address: str) -> bool:
    """Whether an address of object storage has a user or a query, which buckets and objects do not need."""
    return re.search(r"://[^/\s]+@|\?[^/]*=", address) is not None


def credentials_refusal(address: str) -> str:
    """The message about an address with credentials."""
    return (
        f"{redacted(address)} has credentials in it, which would be stored and printed: leave them out and set "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write them into the configuration of multi-storage-client"
    )
