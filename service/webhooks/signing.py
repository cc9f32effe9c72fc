"""How a webhook's receiver knows that it comes from us: `python -m service webhook-secret NAME` prints what it needs.

Follows https://www.standardwebhooks.com. Knows no Redis and no HTTP.
"""

import base64
import hashlib
import hmac


def signing_key(secret: str, owner: str) -> bytes:
    """The key for the messages to one owner's servers: of the service's secret, which no receiver knows."""
    return hmac.digest(secret.encode(), b"labelgrid webhooks of " + owner.encode(), hashlib.sha256)


def shown(key: bytes) -> str:
    """A signing key as receivers are given it."""
    return "whsec_" + base64.b64encode(key).decode()


def signature(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """HMAC-SHA256 over id, timestamp and body, as Standard Webhooks has it."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
