"""A loopback OpenAI-compatible server that behaves as a function says, for tests of the frontier's connection."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from erlib.task.forms import to_json
from erlib.task.schema import Entity, Report

USAGE = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
Reply = tuple[int, dict, object]  # status, further headers, body: bytes, or what is sent as JSON


def report_of(body: dict) -> str:
    """The report of the document asked about: its first word as a firm."""
    name = body["messages"][-1]["content"].split("Document:\n")[-1].split()[0]
    return to_json(Report(entities=(Entity(name=name, type="firm"),)))


def answer(text: object, *, finish: str = "stop", usage: object = USAGE, **message) -> Reply:
    """A success with this text."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    found = {"id": "r", "object": "chat.completion", "model": "m", "choices": [choice]}
    return 200, {}, found | ({} if usage is None else {"usage": usage})


def good(body: dict) -> Reply:
    """The right answer."""
    return answer(report_of(body))


class Server(ThreadingHTTPServer):
    """Answers with `respond(body, n)`, n the number of requests with these messages so far, this one included."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, respond: Callable[[dict, int], Reply]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.respond = respond
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.paths: list[str] = []
        self.asked: dict[str, int] = {}
        self.now = self.most = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        question = body["messages"][-1]["content"]
        with server.lock:
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.paths.append(self.path)
            n = server.asked[question] = server.asked.get(question, 0) + 1
            server.now += 1
            server.most = max(server.most, server.now)
        status, extra, payload = server.respond(body, n)
        with server.lock:
            server.now -= 1
        data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **extra}
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):  # the client has given up
            pass
