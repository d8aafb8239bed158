"""An imitation of an NPU-Exporter: a page in its format, over HTTP."""

import contextlib
import http.server
import threading
from pathlib import Path

import pytest

PAGE = Path(__file__).parent / "npu_exporter.txt"


@pytest.fixture
def page() -> str:
    return PAGE.read_text()


@pytest.fixture
def exporter():
    """The page at ``exporter.url``; ``exporter.page`` may be changed."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.server.page.encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):  # a client that ends doesn't wait
                self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.page = PAGE.read_text()
    server.url = f"http://127.0.0.1:{server.server_port}/metrics"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
