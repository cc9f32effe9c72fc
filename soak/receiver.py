"""A receiver of webhooks that refuses every seventh message, so that some are retried."""

import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REFUSE_EVERY = 7


class Receiver:
    """Listens on a free port. `received`: job and type of each message that was taken."""

    def __init__(self) -> None:
        self.received: set[tuple[str, str]] = set()
        self._count = itertools.count(1)
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = json.loads(self.rfile.read(int(self.headers["content-length"])))
                refused = next(receiver._count) % REFUSE_EVERY == 0
                if not refused:
                    receiver.received.add((message["data"]["id"], message["type"]))
                self.send_response(500 if refused else 200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, name="receiver", daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/"
