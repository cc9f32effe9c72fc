"""Draw label lists in this process, without a service, each until it is exact, and say what the evaluator finds:

pip install 'labelgrid[torch]'
python examples/in_process.py grid.png "red cube, blue sphere" "gray cylinder"
"""

import argparse

from labelgrid import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="the grid, a PNG")
    parser.add_argument("labels", nargs="+", help='the labels of each picture: "red cube, blue sphere"')
    parser.add_argument("--model", help="by default the promoted one")
    parser.add_argument("--attempts", type=int, default=4, help="at each picture, at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lists = [[label.strip() for label in labels.split(",")] for labels in args.labels]

    pictures = load(args.model)(lists, seed=args.seed, until="exact", attempts=args.attempts)
    for picture in pictures:
        tried, found = len(picture.verdict.attempts), ", ".join(picture.found) or "nothing"
        print(f"{', '.join(picture.labels)}: {'exact' if picture.exact else f'found {found}'} ({tried} attempts)")
    pictures.save(args.output)


if __name__ == "__main__":
    main()
