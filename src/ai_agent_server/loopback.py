"""Which hosts are this machine itself: a loopback address or `localhost`. Pure; no name is looked up."""

from ipaddress import ip_address
from urllib.parse import urlsplit

__all__ = ("is_loopback", "is_loopback_url")


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address without brackets, is this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_loopback_url(url: str) -> bool:
    """Whether the host of `url` is this machine; not where it has none, or is no URL."""
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False
