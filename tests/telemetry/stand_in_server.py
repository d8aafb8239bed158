"""Stands in for a W&B server: the calls that ``wandb sync`` makes, answered as one that accepts everything.

It keeps what it was given: a run's lines of history by their place, its summary, its files. It is no W&B server: it
checks no key, and judges nothing.
"""

import gzip
import http.server
import json
import re
import threading


class StandIn(http.server.ThreadingHTTPServer):
    """``server.runs[id]``: {"upsert": variables, "history": {place: row}, "files": {name: bytes}, "complete": bool}."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.runs, self.asked, self.unknown = {}, [], []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # a client that ends doesn't wait

    def run(self, name):
        return self.runs.setdefault(name, {"history": {}, "files": {}, "complete": False, "upsert": {}})

    def lines(self, name):
        """A run's history as W&B would draw it: by its own counter, a later line in the place of an earlier one."""
        rows = [row for _, row in sorted(self.runs[name]["history"].items())]
        return [row for _, row in sorted({row["_step"]: row for row in rows}.items())]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        with self.server.lock:
            if self.path == "/graphql":
                question = json.loads(body)
                answer = {"data": self.graphql(question["operationName"], question.get("variables") or {})}
            else:
                answer = self.other(body)
        self.reply(json.dumps(answer).encode())

    do_PUT = do_POST

    def do_GET(self):
        self.reply(b"a stand-in")

    def reply(self, body):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass

    def graphql(self, operation, variables):
        self.server.asked.append(operation)
        entity = {"id": "e", "name": "someone"}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if operation == "RunResumeStatus":
            known = self.server.runs.get(variables["name"])
            return {
                "model": {
                    "id": "p",
                    "name": "ascent",
                    "entity": entity,
                    "bucket": known and self.bucket(variables),
                }
            }
        if operation == "UpsertBucket":
            run = self.server.run(variables["name"])
            run["upsert"] |= {key: value for key, value in variables.items() if value is not None}
            project = {"id": "p", "name": "ascent", "entity": entity}
            return {
                "upsertBucket": {"bucket": {**self.bucket(variables), "project": project}, "inserted": True}
            }
        if operation == "CreateRunFiles":
            urls = [
                {"name": name, "uploadUrl": f"{self.server.url}/put/{variables['run']}/{name}"}
                for name in variables["files"]
            ]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": urls}}
        if operation == "CreateArtifact":
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        self.server.unknown.append(operation)
        return {}

    def bucket(self, variables):
        history = self.server.run(variables["name"])["history"]
        last = [json.dumps(history[max(history)])] if history else []
        empty = {
            "description": "",
            "config": "{}",
            "sweepName": None,
            "summaryMetrics": "{}",
            "tags": [],
            "notes": "",
        }
        counts = {
            "logLineCount": 0,
            "historyLineCount": len(history),
            "eventsLineCount": 0,
            "eventsTail": "[]",
        }
        names = {"id": "r", "name": variables["name"], "displayName": variables["name"]}
        return {**names, **empty, **counts, "historyTail": json.dumps(last), "wandbConfig": '{"t": 1}'}

    def other(self, body):
        if self.path.startswith("/put/"):
            _, _, run, name = self.path.split("/", 3)
            self.server.run(run)["files"][name] = body
        elif self.path.endswith("/file_stream"):
            run = self.server.run(self.path.split("/")[-2])
            sent = json.loads(body)
            run["complete"] |= bool(sent.get("complete"))
            for place, line in enumerate(
                (found := sent.get("files", {}).get("wandb-history.jsonl", {})).get("content", [])
            ):
                row = json.loads(re.sub(r"\b(NaN|-?Infinity)\b", "null", line))
                run["history"][found["offset"] + place] = row
        else:
            self.server.unknown.append(self.path)
        return {}
