"""How a webhook's receiver knows that it comes from us: `python -m service.webhooks.signing NAME` prints what it needs.

Follows https://www.standardwebhooks.com. Knows no Redis and no HTTP.
"""

import argparse
import base64
import hashlib
import hmac
import sys

from service.settings import SettingError, read_settings


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


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m service.webhooks.signing",
        description="Prints the secret with which an owner's servers verify webhooks, from LABELGRID_WEBHOOK_SECRET.",
    )
    parser.add_argument("name", nargs="?", default="", help="the owner; none where there are no API keys")
    name = parser.parse_args().name
    try:
        secret = read_settings().webhook_secret
    except SettingError as error:
        print(f"labelgrid: {error}", file=sys.stderr)
        return 1
    if secret is None:
        print("labelgrid: LABELGRID_WEBHOOK_SECRET is not set", file=sys.stderr)
        return 1
    print(shown(signing_key(secret.get_secret_value(), name)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
