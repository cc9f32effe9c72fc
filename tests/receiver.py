"""A receiver of webhooks, as a process of its own: `python -m tests.receiver PORT_FILE LOG_FILE STATUS...`.

Writes what it gets to LOG_FILE, one JSON object a line, and answers with STATUS after STATUS, the last one for ever. A
status of 0 never answers; -N answers 200 after N seconds; 307 sends on to /elsewhere.
"""

import json
import os
import ssl
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

port_file, log_file = Path(sys.argv[1]), Path(sys.argv[2])
statuses = [int(status) for status in sys.argv[3:]]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
        entry = {"path": self.path, "headers": {k.lower(): v for k, v in self.headers.items()}, "body": body}
        with log_file.open("a") as log:
            log.write(json.dumps(entry) + "\n")
        if status <= 0:
            time.sleep(-status or 600)
            status = 200
        self.send_response(status)
        if status == 307:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.daemon_threads = True
if certificate := os.environ.get("RECEIVER_CERTIFICATE"):  # a PEM with key and certificate: then it talks TLS
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
port_file.with_suffix(".part").write_text(str(server.server_address[1]))
port_file.with_suffix(".part").rename(port_file)
server.serve_forever()
