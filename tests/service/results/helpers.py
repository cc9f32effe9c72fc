"""Finished jobs in storage, as a worker leaves them; only the network is missing."""

import random
import struct
from collections.abc import Sequence

from service.contract.records import FinishedPicture, JobRecord, Picture, Verdict
from service.results.writer import ResultWriter
from service.store.claims import PictureStream
from service.store.jobs import JobStore
from service.worker.completion import complete_jobs
from shared.vocabulary import ICLEVR


def noise(seed: int, size: int) -> bytes:
    """Return bytes in place of a PNG that nothing decodes."""
    return random.Random(seed).randbytes(size)


def judged(picture: Picture, png: bytes) -> FinishedPicture:
    """Return a finished picture whose verdict is as long as the evaluator's: 32-bit probabilities of all labels."""
    drawn = random.Random(picture.seed)
    probabilities = {name: struct.unpack("f", struct.pack("f", 10 ** -drawn.uniform(0, 7)))[0] for name in ICLEVR.names}
    about = {"index": picture.index, "labels": picture.labels, "seed": picture.seed, "probabilities": probabilities}
    return FinishedPicture(picture, Verdict(**about, accuracy=1.0, f1=1.0, exact=True), png)


def finish(store: JobStore, writer: ResultWriter, record: JobRecord, pngs: Sequence[bytes]) -> None:
    """Create a job and finish it with these pictures."""
    store.create(record)
    finish_open(store, writer, record, pngs)


def finish_open(store: JobStore, writer: ResultWriter, record: JobRecord, pngs: Sequence[bytes]) -> None:
    """Finish a job, whose pictures are all that is pending, with these."""
    stream = PictureStream(store.connection, store.settings, record.digest, "w")
    claims = stream.claim_new(record.total)
    assert {claim.picture.job for claim in claims} == {record.id}
    store.begin(record.id)
    finished = [judged(claim.picture, pngs[claim.picture.index]) for claim in claims]
    kept = writer.keep_pictures(finished, store.owners([record.id]))
    entries = [(claim.entry, one) for claim, one in zip(claims, finished, strict=True)]
    complete = store.commit(stream.key, entries, kept)
    assert complete == {record.id}
    complete_jobs(store, None, complete, {}, writer)
