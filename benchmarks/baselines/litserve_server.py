"""LitServe, batching requests as its documentation shows: `python -m benchmarks.baselines.litserve_server KIND`.

KIND is what it draws with: `engine`, `diffusers` or `diffusers-defaults`.
"""

import argparse

import litserve
from fastapi import Response

from benchmarks.baselines.drawing import DRAWINGS, Request

REQUESTS_AT_ONCE = 8  # more pictures than the network gains from
WAIT_S = 0.01  # for more requests


class Api(litserve.LitAPI):  # type: ignore[misc]
    """Draws the pictures of several requests at once."""

    def __init__(self, kind: str) -> None:
        super().__init__(max_batch_size=REQUESTS_AT_ONCE, batch_timeout=WAIT_S, api_path="/generate")
        self.kind = kind

    def setup(self, device: str) -> None:
        self.drawing = DRAWINGS[self.kind]()

    def decode_request(self, request: Request) -> Request:
        return request

    def batch(self, inputs: list[Request]) -> list[Request]:
        return inputs

    def predict(self, requests: list[Request]) -> list[bytes]:
        return self.drawing(requests)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="image/png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m benchmarks.baselines.litserve_server", description=__doc__)
    parser.add_argument("drawing", choices=DRAWINGS)
    parser.add_argument("--port", type=int, required=True)
    asked = parser.parse_args()
    server = litserve.LitServer(Api(asked.drawing), accelerator="cpu", timeout=False)
    server.run(host="127.0.0.1", port=asked.port, log_level="error", generate_client_file=False)
