"""The command that makes data of other data sets: `import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shared.vocabulary import read_train_file
from trainer.commands import options, terminal
from trainer.errors import TrainerError

RARE = 10  # training pictures, at least, without which a label is hardly learnt


def import_data(
    source: Annotated[
        Path,
        typer.Argument(
            exists=True,
            help="An image folder (metadata file, .txt captions, or a folder for each class), a .csv file, COCO's "
            "annotations, a Parquet file, a folder of `datasets`; or a data set folder that lacks a positions.json.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Argument(file_okay=False, help="Folder to write: train and held-out in it.")
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of the pictures; that of the file by default."),
    ] = None,
    labels: Annotated[
        list[str] | None, typer.Option(help='A field that names labels ("labels" by default). Repeatable.')
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="What separates labels in one text: by default a comma in captions, else ;.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="The split to read, where there are several: train, validation, test.")
    ] = None,
    held_out: Annotated[float, typer.Option(min=0, max=0.9, help="Share of labelled pictures to hold out.")] = 0.1,
    held_out_files: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Hold out the pictures that this file names, one a line."),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(
            help="A field: pictures that agree in it are all held out, or none. "
            "With `labels`, whole label sets are: pictures of unseen combinations."
        ),
    ] = None,
    crop: Annotated[bool, typer.Option("--crop", help="Cut out the middle square instead of squeezing.")] = False,
    mirror: Annotated[bool, typer.Option("--mirror", help="Also train on pictures mirrored left to right.")] = False,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Keep pictures without labels; they serve guidance.")
    ] = False,
    seed: options.Seed = 0,
) -> None:
    """Import a data set: pictures and labels become the folders that the other commands read.

    Reads a Hugging Face image folder (metadata.jsonl or metadata.csv), pictures with .txt captions, a folder for each
    class, a CSV file, a Parquet file, a folder that Hugging Face's `datasets` saved, or COCO annotations, whose boxes
    become positions and sizes. Broken pictures are skipped and listed in skipped.txt.

    For a data set folder in which each picture of a scene shows one object more, it finds where the objects are and
    writes positions.json, from which the network learns positions.
    """
    from trainer.importer import folders
    from trainer.importer.formats import read_names, read_source

    if (source / "objects.json").exists() and out is None:
        _locate(source)
        return
    if out is None:
        raise TrainerError(f"say where to: trainer import {source} FOLDER")
    if (out / folders.TRAIN / "train.json").exists():
        raise TrainerError(f"{out} already holds a data set; choose another folder or remove it")
    found = read_source(source, pictures=pictures, labels=labels or [], group=group, separator=separator, split=split)
    names = read_names(held_out_files) if held_out_files else None
    with terminal.bar() as progress:
        task = progress.add_task("importing", total=len(found.items))
        report = folders.write_folders(
            found, out, share=held_out, held_out=names, seed=seed, crop=crop, mirror=mirror, unlabelled=unlabelled,
            advance=lambda n: progress.advance(task, n),
        )  # fmt: skip
    seen, unseen = folders.label_counts(report.train), folders.label_counts(report.held_out)
    order = sorted(report.vocabulary, key=lambda name: (seen[name], name))
    rows = [[name, str(seen[name]), str(unseen[name]), "rare" * (seen[name] < RARE)] for name in order]
    terminal.print_table(f"{len(order)} labels", ["label", "training pictures", "held out", ""], rows)
    for note in found.notes:
        print(f"note: {note}")
    if few := [name for name in order if seen[name] < RARE]:
        print(f"note: {len(few)} labels have fewer than {RARE} training pictures, too few to learn them well")
    summary = [("training pictures", str(len(report.train))), ("held out", str(len(report.held_out)))]
    if report.skipped:
        summary.append(("skipped", f"{len(report.skipped)}, listed in {out / folders.SKIPPED}"))
    terminal.show("imported", [*summary, ("folder", str(out))])


def _locate(data: Path) -> None:
    from trainer.data import read_folders
    from trainer.data_folder import write_label_file
    from trainer.importer import locate as located

    if (out := data / "positions.json").exists():
        raise TrainerError(f"{out} already exists; remove it to write it again")
    with terminal.bar() as progress:
        dataset = read_folders([data], progress, size=located.SIZE)
    positions = located.locate(read_train_file(data / "train.json", dataset.vocabulary), dataset.images[:])
    write_label_file(out, positions)
    terminal.show("located", [("pictures", str(len(positions))), ("file", str(out))])
