"""An HTTP server in the process of a test."""

import json
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StandIn:
    """An HTTP server in this process; ``answer(method, path, body)`` gives a status and an object, None hangs up."""

    def __init__(self, answer):
        self.asked, self.busy, self.most = [], 0, 0
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def respond(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = json.loads(body) if body else None
                with lock:
                    outer.asked.append((self.command, self.path, body, dict(self.headers)))
                    outer.busy += 1
                    outer.most = max(outer.most, outer.busy)
                try:
                    found = answer(self.command, self.path, body)
                finally:
                    with lock:
                        outer.busy -= 1
                if found is None:
                    self.close_connection = True
                    return
                data = found[1] if isinstance(found[1], bytes) else json.dumps(found[1]).encode()
                with suppress(ConnectionError):  # the client may have given up
                    self.send_response(found[0])
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            do_GET = do_POST = respond

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()
