"""Download a small real data set: emoji of people, labelled by skin tone, gender and activity.

    python examples/emoji_set.py OUT [--seed N]

writes OUT as an image folder for `trainer import` (docs/own-data.md): 768 pictures of 64x64, `metadata.jsonl`, and
`held-out.txt`, the fifth of the pictures to hold out. No two pictures have the same three labels, so each picture held
out is a combination that is never trained on. --seed chooses other combinations.

The pictures are Twemoji's, copyright Twitter, Inc and other contributors, under CC BY 4.0; they come with the npm
package emoji-datasource-twitter.
"""

import argparse
import hashlib
import io
import json
import random
import re
import tarfile
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

ADDRESS = "https://registry.npmjs.org/emoji-datasource-twitter/-/emoji-datasource-twitter-16.0.0.tgz"
SHA256 = "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"
NO_TONE = "yellow skin"
TONES = {
    "1F3FB": "light skin",
    "1F3FC": "medium-light skin",
    "1F3FD": "medium skin",
    "1F3FE": "medium-dark skin",
    "1F3FF": "dark skin",
}
FEWEST = 12  # pictures of a label: with fewer there is too little to learn it from
HELD_OUT = 5  # one picture of so many


def download() -> tarfile.TarFile:
    """Return the package, 62 MB. OSError without a network, ValueError if it is not the expected file."""
    with urllib.request.urlopen(ADDRESS, timeout=60) as answer:
        data = answer.read()
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise ValueError(f"{ADDRESS} has the SHA-256 {found}, expected {SHA256}")
    return tarfile.open(fileobj=io.BytesIO(data))


def labelled(emoji: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return file names with their labels, for people of one gender in all skin tones, by file name."""
    found: dict[str, list[str]] = {}
    for one in emoji:
        words = set(re.findall("[a-z]+", one["name"].lower()))
        gender = next((word for word in ("woman", "man") if word in words), None)
        if gender is None or "skin_variations" not in one:
            continue
        activity = re.sub("(wo)?man[-_]|(fe)?male-", "", one["short_name"]).replace("_", " ")
        if activity == gender:  # a face that does nothing
            continue
        forms = {NO_TONE: one} | {TONES[code]: form for code, form in one["skin_variations"].items() if code in TONES}
        found |= {form["image"]: [tone, gender, activity] for tone, form in forms.items() if form["has_img_twitter"]}
    counts = Counter(label for labels in found.values() for label in labels)
    return {name: found[name] for name in sorted(found) if min(counts[label] for label in found[name]) >= FEWEST}


def write(out: Path, package: tarfile.TarFile, seed: int) -> str:
    """Write the image folder, and return what it holds."""
    description = package.extractfile("package/emoji.json")
    assert description is not None
    pictures = labelled(json.load(description))
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    for name in pictures:
        picture = package.extractfile(f"package/img/twitter/64/{name}")
        assert picture is not None
        (out / "pictures" / name).write_bytes(picture.read())
    rows = [{"file_name": f"pictures/{name}", "labels": labels} for name, labels in pictures.items()]
    (out / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = random.Random(seed).sample([str(row["file_name"]) for row in rows], len(rows) // HELD_OUT)
    (out / "held-out.txt").write_text("\n".join(sorted(held_out)) + "\n")
    labels = {label for one in pictures.values() for label in one}
    return f"{len(pictures)} pictures, {len(labels)} labels, {len(held_out)} pictures to hold out"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with download() as package:
        print(write(arguments.out, package, arguments.seed))


if __name__ == "__main__":
    main()
