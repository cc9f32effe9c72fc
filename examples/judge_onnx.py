"""Print what is in a picture, with onnxruntime, numpy and Pillow alone:

python -m trainer export iclevr-resnet18 evaluator.onnx
python examples/judge_onnx.py evaluator.onnx picture.png
"""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluator", help="the exported evaluator")
    parser.add_argument("picture")
    arguments = parser.parse_args()
    session = onnxruntime.InferenceSession(arguments.evaluator)
    labels = json.loads(session.get_modelmeta().custom_metadata_map["label_names"])
    picture = Image.open(arguments.picture).convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
    images = np.asarray(picture, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1  # (1, 3, 64, 64), from -1 to 1
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, {"images": images}), strict=True))
    for i, label in enumerate(labels):
        if found["probabilities"][0, i] > 0.5:
            where = ""
            if "positions" in found:  # only an evaluator with a position head has them
                x, y = found["positions"][0, i]
                where = f" at {x:.2f}, {y:.2f}"
            print(f"{label}{where}")


if __name__ == "__main__":
    main()
