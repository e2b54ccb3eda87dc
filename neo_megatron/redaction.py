"""Keeps credentials out of what is printed and written: those in addresses, and access keys, known by their form.

Needs nothing but the standard library.
"""

import re

_USER = re.compile(r"(?<=://)[^/\s@'\"]+@")
_QUERY = re.compile(r"(\b\w+://[^\s?'\"]+\?)[^\s'\"]+")
# Access key ids of AWS and tokens of Hugging Face, GitHub and GitLab.
_KEYS = re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\b(?:hf|ghp|gho|ghs|glpat)[_-][0-9A-Za-z_-]{16,}")


def redacted(text: str) -> str:
    """The text with ``***`` for the user and the query of every address in it, and for every access key."""
    if "://" in text:
        text = _QUERY.sub(r"\1***", _USER.sub("***@", text))
    return _KEYS.sub("***", text)


def has_credentials(address: str) -> bool:
    """Whether an address of object storage has a user or a query; buckets and keys of objects need neither."""
    return _USER.search(address) is not None or re.search(r"\?[^/]*=", address) is not None


def credentials_refusal(address: str) -> str:
    """The sentence about such an address."""
    return (
        f"{redacted(address)} has credentials in it, which would be stored and printed: leave them out and set "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write them into the configuration of multi-storage-client"
    )
