"""Signs webhooks, so that receivers can verify them. Knows no Redis and no HTTP.

`python -m service webhook-secret NAME` prints a receiver's secret. Follows https://www.standardwebhooks.com.
"""

import base64
import hashlib
import hmac


def signing_key(secret: str, owner: str) -> bytes:
    """Derive the key for one owner's messages from the service's secret, which no receiver knows."""
    return hmac.digest(secret.encode(), b"labelgrid webhooks of " + owner.encode(), hashlib.sha256)


def receiver_secret(key: bytes) -> str:
    """Return a signing key in the form that receivers configure."""
    return "whsec_" + base64.b64encode(key).decode()


def signature(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """Return the HMAC-SHA256 over id, timestamp and body, in Standard Webhooks' format."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
