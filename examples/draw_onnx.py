"""Draw a picture with onnxruntime, numpy and Pillow alone, from the files that `trainer export` writes:

    python -m trainer export iclevr-320x240 denoiser.onnx
    python examples/draw_onnx.py denoiser.onnx picture.png "red cube" "blue sphere" --seed 7

The steps are those of the service; its random numbers are torch's, so the same seed gives another picture.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

OUTSIDE = -10.0  # where labels are that the picture does not show


def draw_layout(session: onnxruntime.InferenceSession, labels: list[int], rng: np.random.Generator) -> np.ndarray:
    """Draw the labels' positions (n, 2), one object after the other: row, column, finer row, finer column."""
    n, most = len(labels), session.get_inputs()[0].shape[0]
    if n > most:
        raise SystemExit(f"{n} objects: the layout network draws {most} at most")
    order = rng.permutation(n)
    inputs = {"objects": np.zeros(most, np.int64), "places": np.zeros((most, 2), np.float32), "number": np.array([n])}
    inputs["objects"][:n] = np.array(labels)[order]
    for i in range(n):
        drawn = np.zeros(4, np.int64)
        for j in range(4):
            [logits] = session.run(["logits"], inputs | {"drawn": drawn, "object": np.array([i])})
            odds = np.exp(logits[j] - logits[j].max(), dtype=np.float64).cumsum()
            drawn[j] = np.searchsorted(odds, rng.random() * odds[-1])
        cells = logits.shape[1]
        row, column = (drawn[:2] * cells + drawn[2:] + rng.random(2)) / cells**2
        inputs["places"][i] = column, row
    return inputs["places"][np.argsort(order)]  # of the labels in their own order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the denoiser's file; its -upsampler and -layouts lie beside it")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("labels", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = np.random.default_rng(asked.seed)

    denoiser = onnxruntime.InferenceSession(asked.file)
    about = denoiser.get_modelmeta().custom_metadata_map
    names, options = json.loads(about["label_names"]), json.loads(about["sampling"])
    to_x0 = json.loads(about["to_x0"])
    if unknown := [label for label in asked.labels if label not in names]:
        parser.error(f"{asked.file} does not know {', '.join(unknown)}; its labels are {', '.join(names)}")
    chosen = [names.index(label) for label in asked.labels]
    inputs = {"labels": np.zeros((1, len(names)), np.float32)}
    inputs["labels"][0, chosen] = 1
    parts = {name: asked.file.with_stem(f"{asked.file.stem}-{name}") for name in json.loads(about["parts"])}
    if layouts := parts.get("layouts"):
        inputs["positions"] = np.full((1, len(names), 2), OUTSIDE, np.float32)
        inputs["positions"][0, chosen] = draw_layout(onnxruntime.InferenceSession(layouts), chosen, rng)
        print(json.dumps(inputs["positions"][0, chosen].tolist()))
    if any(one.name == "rotations" for one in denoiser.get_inputs()):
        turns = 2 * np.pi * rng.random((1, len(names)), np.float32)
        inputs["rotations"] = np.stack([np.cos(turns), np.sin(turns)], -1)
        inputs["rotations"][:, json.loads(about.get("symmetric", "[]"))] = 0  # have no rotation

    def predict(x: np.ndarray, t: int) -> np.ndarray:
        """Return x_0 as the network sees it at timestep t, guided."""
        low, high = options["guidance_interval"]
        w = options["guidance"] if low <= t / len(to_x0) <= high else 1.0
        guided = np.zeros_like(x)
        for keep, weight in ((True, w), (False, 1 - w)):
            if weight:
                at = {"x_t": x, "t": np.array([t]), "keep": np.array([keep])}
                guided += np.float32(weight) * denoiser.run(["prediction"], at | inputs)[0]
        p, q, limit = to_x0[t]
        x_0 = p * x + q * guided
        limit = 1 if options["clip_x0"] else limit
        return x_0 if limit is None else np.clip(x_0, -limit, limit)

    shape = denoiser.get_inputs()[0].shape[1:]
    x = rng.standard_normal((1, *shape), np.float32)
    before, noise, table = x, x, json.loads(about["table"])
    for t, a, b, c, s in table:
        x_0 = predict(x, t)
        x = a * x + b * x_0 + c * before
        if s:
            x = x + s * rng.standard_normal(x.shape)
        x, before = x.astype(np.float32), x_0
    if upsampler := parts.get("upsampler"):
        [x] = onnxruntime.InferenceSession(upsampler).run(["pictures"], {"x": x})
    elif any(one.name == "pictures" for one in denoiser.get_outputs()):  # a model of one step returns them itself
        at = {"x_t": noise, "t": np.array([table[0][0]]), "keep": np.array([True])}
        [x] = denoiser.run(["pictures"], at | inputs)
    pixels = ((x[0].transpose(1, 2, 0) + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(asked.picture)


if __name__ == "__main__":
    main()
