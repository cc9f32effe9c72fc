"""A zip of pictures, made while it is sent: few pictures are in memory at any time. Knows no HTTP and no jobs."""

import zipfile
from collections.abc import AsyncIterator

PERMISSIONS = 0o644  # of unpacked files; without them `unzip` makes files that nobody may read


class _Written:
    """What `zipfile` has written and nobody has taken yet. It cannot seek, so sizes stand behind the pictures."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, part: bytes) -> int:
        self._parts.append(bytes(part))
        return len(part)

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """`zipfile` closes only what it opened itself."""

    def take(self) -> bytes:
        taken = b"".join(self._parts)
        self._parts.clear()
        return taken


async def zip_stream(pictures: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the parts of a zip of PNGs, 0.png, 1.png, ...: the names that /score takes. Equal pictures, equal bytes."""
    written = _Written()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_STORED) as archive:  # a PNG is compressed already
        index = 0
        async for png in pictures:
            entry = zipfile.ZipInfo(f"{index}.png")
            entry.external_attr = PERMISSIONS << 16
            archive.writestr(entry, png)
            yield written.take()
            index += 1
    yield written.take()
