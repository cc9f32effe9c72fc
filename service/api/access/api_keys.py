"""API keys, which name the owner of a request. The service stores only hashes; `python -m service keys NAME` makes one.

Knows neither HTTP nor Redis. A key has 256 random bits, so a plain SHA-256 of it cannot be reversed by guessing; slow
hashes are for passwords, which people choose.
"""

import hashlib
import hmac
import re
import secrets
from functools import lru_cache
from pathlib import Path

from service.settings import StartError
from service.telemetry.logs import get_logger

log = get_logger(__name__)

NOBODY = ""  # the owner of every request if there are no keys
PREFIX = "lg_"  # lets scanners find leaked keys
ENTRY = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,63}):(?P<hash>[0-9a-f]{64})")


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def new_key() -> str:
    return PREFIX + secrets.token_urlsafe(32)


@lru_cache(2)  # of a text that has not changed
def parse(listed: str, source: str) -> tuple[tuple[str, str], ...]:
    """Return the owner and hash of each key in a text of NAME:HASH entries. Keys with one name belong to one owner.

    Entries are separated by spaces, commas or lines; # begins a comment. Raises StartError, whose message names the
    text by its `source` and never shows its content.
    """
    entries = [entry for line in listed.splitlines() for entry in line.partition("#")[0].replace(",", " ").split()]
    matches = [ENTRY.fullmatch(entry) for entry in entries]
    if None in matches:
        raise StartError(
            f"{source}: entry {matches.index(None) + 1} is not NAME:HASH, as `python -m service keys` prints it"
        )
    return tuple((match["name"], match["hash"]) for match in matches if match is not None)


class KeyRing:
    """The keys of setting and file. Reads the file each time, so that a key can be revoked.

    A setting without a key in it, such as a comment, raises StartError: it was meant to restrict access; so does a file
    that is missing at the start. A file without keys lets nobody in, nor does one that is deleted later.
    """

    def __init__(self, listed: str, file: Path | None) -> None:
        self._listed, self._file = parse(listed, "LABELGRID_API_KEYS"), file
        if listed.strip() and not self._listed:
            raise StartError("LABELGRID_API_KEYS is set but names no key; unset it to run without keys")
        self._of_file: tuple[tuple[str, str], ...] = ()
        self._read()
        self.enabled = bool(self._listed) or file is not None

    def _read(self) -> None:
        if self._file is None:
            return
        try:
            self._of_file = parse(self._file.read_text(), str(self._file))
        except (OSError, UnicodeDecodeError) as error:
            raise StartError(f"{self._file} cannot be read: {error}") from error

    def owner_of(self, key: str) -> str | None:
        """Return the owner of a key, or None if it is unknown. Compares it with every known hash, in constant time."""
        try:
            self._read()
        except StartError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                self._of_file = ()
                log.error("the file of API keys is gone; none of its keys is valid", reason=str(error))
            else:  # a typing error locks nobody out
                log.error("API keys cannot be read; the keys read before stay valid", reason=str(error))
        hashed, found = hash_of(key), None
        for owner, known in self._listed + self._of_file:
            if hmac.compare_digest(hashed, known):
                found = owner
        return found
