"""Draw the same pictures with several numbers of steps (rows) and values of guidance (columns), in one grid:

    pip install pillow
    python examples/sweep.py sweep.png "red cube, blue sphere" "gray cylinder" --model iclevr-320x240 --steps 2 4 8

The service is at LABELGRID_URL, by default on this machine.
"""

import argparse
import io

from PIL import Image, ImageDraw

from labelgrid import Client

LINE, CAPTION = 24, 200  # height and width in pixels of what stands above a cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="the grid, a PNG")
    parser.add_argument("labels", nargs="+", help='the labels of each picture: "red cube, blue sphere"')
    parser.add_argument("--model", help="one that takes several steps; by default the promoted one")
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lists = [[label.strip() for label in labels.split(",")] for labels in args.labels]

    cells = {}
    with Client() as client:
        for row, steps in enumerate(args.steps):
            for column, w in enumerate(args.guidance):
                job = client.generate(lists, model=args.model, steps=steps, guidance=w, seed=args.seed)
                grid = Image.open(io.BytesIO(client.grid(job.id)))
                cells[row, column] = grid, f"{steps} steps, w = {w:g}: accuracy {job.result.accuracy:.2f}"

    width, height = max(grid.width, CAPTION), LINE + grid.height  # the same in every cell
    sheet = Image.new("RGB", (width * len(args.guidance), height * len(args.steps)), "white")
    pen = ImageDraw.Draw(sheet)
    for (row, column), (grid, caption) in cells.items():
        pen.text((width * column + 4, height * row + 4), caption, "black")
        sheet.paste(grid, (width * column, height * row + LINE))
    sheet.save(args.output)


if __name__ == "__main__":
    main()
