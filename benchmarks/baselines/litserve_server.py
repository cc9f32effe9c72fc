"""LitServe with the same checkpoint, batching requests: `python -m benchmarks.baselines.litserve_server`."""

import argparse

import litserve
from fastapi import Response

from benchmarks.baselines.servers import Drawing, Request

REQUESTS_AT_ONCE = 8  # more pictures than the network gains from
WAIT_S = 0.01  # for more requests


class Api(litserve.LitAPI):  # type: ignore[misc]
    """Samples the pictures of several requests, with mixed options, in one batch."""

    def setup(self, device: str) -> None:
        self.drawing = Drawing()

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
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args().port
    api = Api(max_batch_size=REQUESTS_AT_ONCE, batch_timeout=WAIT_S, api_path="/generate")
    server = litserve.LitServer(api, accelerator="cpu", timeout=False)
    server.run(host="127.0.0.1", port=port, log_level="error", generate_client_file=False)
