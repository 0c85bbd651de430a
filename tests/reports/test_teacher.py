"""The frontier connection against a real loopback endpoint: retries, concurrency, cache, budget, resume."""

import json
import math
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from erlib.reports import extraction, prompts, teacher
from erlib.task import evaluation
from erlib.task.forms import to_json
from erlib.task.schema import Document, Entity, Report

TEMPLATE = prompts.Template("t", "", "Report the firms.")
DOCUMENTS = [Document(id=f"d{i}", text=f"Firm{i} is hiring.") for i in range(12)]


class Endpoint(ThreadingHTTPServer):
    """An OpenAI-compatible server whose first answers follow `script`; it counts what it sees."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[str] = []
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.delay = 0.0
        self.now = self.most = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers))
            turn = self.server.script.pop(0) if self.server.script else "ok"
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        time.sleep(1.0 if turn == "slow" else self.server.delay)
        status, extra, payload = self.answer(turn, body)
        with self.server.lock:
            self.server.now -= 1
        try:
            self.send_response(status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(payload)), **extra}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(payload)
        except (BrokenPipeError, ConnectionResetError):  # the client gave the slow answer up
            pass

    def answer(self, turn: str, body: dict) -> tuple[int, dict, bytes]:
        error = json.dumps({"error": {"message": turn}}).encode()
        if turn == "429":
            return 429, {"Retry-After": "0"}, error
        if turn in ("400", "401", "500", "503"):
            return int(turn), {}, error
        if turn == "malformed":
            return 200, {}, b'{"choices": [{"mess'
        name = body["messages"][-1]["content"].split()[1]
        text = "" if turn == "empty" else to_json(Report(entities=(Entity(name=name, type="firm"),)))
        message = {"role": "assistant", "content": text}
        reply = {
            "id": "r",
            "object": "chat.completion",
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
        }
        return 200, {}, json.dumps(reply).encode()


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    server = Endpoint()
    yield server
    server.shutdown()
    server.server_close()


def connect(endpoint, tmp_path, **changes):
    limits = {name: changes.pop(name) for name in ("concurrency", "attempts") if name in changes}
    settings = {"cache_dir": tmp_path / "cache", "limits": teacher.Limits(backoff=0.01, timeout=0.5, **limits)}
    return teacher.connect("frontier:large", api_base=endpoint.url, **settings, **changes)


def ask(lm, documents=DOCUMENTS, threads=4):
    return extraction.extract(lm, documents, template=TEMPLATE, threads=threads)


def names(parsed):
    return [[entity.name for entity in p.report.entities] for p in parsed]


def test_an_endpoint_gets_the_messages_the_model_the_settings_and_the_key(endpoint, tmp_path):
    lm = connect(endpoint, tmp_path, max_tokens=77)
    assert names(ask(lm)) == [[f"Firm{i}"] for i in range(12)]
    body = endpoint.bodies[0]
    assert body["model"] == "frontier:large" and body["temperature"] == 0.0
    assert 77 in (body.get("max_tokens"), body.get("max_completion_tokens"))
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert endpoint.headers[0]["Authorization"] == "Bearer sk-very-secret"
    spent = teacher.usage(lm)
    assert (spent.requests, spent.input_tokens, spent.output_tokens) == (12, 1200, 240)


@pytest.mark.parametrize("fault", ["429", "500", "503", "malformed", "slow"])
def test_transient_faults_are_tried_again(endpoint, tmp_path, fault):
    endpoint.script = [fault, fault]
    lm = connect(endpoint, tmp_path)
    assert names(ask(lm, DOCUMENTS[:1])) == [["Firm0"]]
    assert teacher.usage(lm).retries == 2 and len(endpoint.bodies) == 3


def test_a_fault_that_stays_is_raised_after_the_last_attempt(endpoint, tmp_path):
    from dspy.lm15 import ServerError

    endpoint.script = ["500"] * 9
    with pytest.raises(Exception, match="500") as caught:
        ask(connect(endpoint, tmp_path, attempts=3), DOCUMENTS[:1])
    assert isinstance(caught.value.__cause__ or caught.value, ServerError)
    assert len(endpoint.bodies) == 3


@pytest.mark.parametrize("fault", ["400", "401"])
def test_a_refusal_is_not_tried_again(endpoint, tmp_path, fault):
    endpoint.script = [fault] * 9
    with pytest.raises(Exception, match=fault):
        ask(connect(endpoint, tmp_path), DOCUMENTS[:1])
    assert len(endpoint.bodies) == 1


def test_an_empty_completion_is_an_unparsable_answer_not_an_error(endpoint, tmp_path):
    endpoint.script = ["empty"]
    lm = connect(endpoint, tmp_path)
    parsed = ask(lm, DOCUMENTS[:1])[0]
    assert parsed.report == Report() and not parsed.valid
    assert teacher.usage(lm).empty == 1


def test_the_server_never_sees_more_requests_at_once_than_the_limit(endpoint, tmp_path):
    endpoint.delay = 0.05
    ask(connect(endpoint, tmp_path, concurrency=3), threads=12)
    assert endpoint.most == 3


def test_what_is_cached_is_not_asked_again_even_by_a_new_connection(endpoint, tmp_path):
    first = ask(connect(endpoint, tmp_path))
    lm = connect(endpoint, tmp_path)
    assert ask(lm) == first
    assert len(endpoint.bodies) == 12
    assert teacher.usage(lm) == teacher.Usage(cached=12)
    assert str(teacher.usage(lm)).startswith("0 requests sent, 12 answers from the cache")


@pytest.mark.parametrize("change", [{"temperature": 0.7}, {"max_tokens": 9}, {"model": "other"}, {"template": "Else."}])
def test_another_model_setting_or_prompt_is_another_cache_entry(endpoint, tmp_path, change):
    ask(connect(endpoint, tmp_path), DOCUMENTS[:1])
    template = prompts.Template("t", "", change.pop("template", TEMPLATE.system))
    model = change.pop("model", "frontier:large")
    lm = teacher.connect(model, api_base=endpoint.url, cache_dir=tmp_path / "cache", **change)
    extraction.extract(lm, DOCUMENTS[:1], template=template)
    assert len(endpoint.bodies) == 2


def test_the_key_is_never_written(endpoint, tmp_path, caplog):
    endpoint.script = ["429"]
    lm = connect(endpoint, tmp_path)
    ask(lm)
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"very-secret" not in stored and b"Firm3" in stored
    assert "very-secret" not in caplog.text + repr(lm) + repr(vars(lm))


# -- budget -------------------------------------------------------------------------------------------------------


def priced(usd):
    """An answer of 120 tokens costs 12 cents."""
    return {"budget": teacher.Budget(usd, price_in=1000.0, price_out=1000.0), "max_tokens": 50}


def test_the_budget_stops_before_it_is_exceeded_and_keeps_what_was_paid(endpoint, tmp_path):
    lm = connect(endpoint, tmp_path, **priced(0.8))
    with pytest.raises(teacher.BudgetExceeded, match="budget_usd"):
        ask(lm)
    sent = len(endpoint.bodies)
    assert sent == 4  # a fifth could have cost 39 cents
    assert teacher.usage(lm).usd == pytest.approx(0.48)
    with pytest.raises(teacher.BudgetExceeded):  # a new connection has no new budget
        ask(connect(endpoint, tmp_path, **priced(0.8)))
    assert len(endpoint.bodies) == sent
    assert names(ask(connect(endpoint, tmp_path, **priced(5.0)))) == [[f"Firm{i}"] for i in range(12)]
    assert len(endpoint.bodies) == 12


def test_requests_under_way_count_at_their_worst_case(endpoint, tmp_path):
    """Twelve threads at once neither slip past the budget together nor give up while others may still settle."""
    endpoint.delay = 0.05
    lm = connect(endpoint, tmp_path, **priced(1.2))
    with pytest.raises(teacher.BudgetExceeded):
        ask(lm, threads=12)
    assert endpoint.most == 3 and len(endpoint.bodies) == 7


def test_a_failed_request_gives_its_reservation_back(endpoint, tmp_path):
    endpoint.script = ["400"]
    lm = connect(endpoint, tmp_path, **priced(0.4))
    with pytest.raises(Exception, match="400"):
        ask(lm, DOCUMENTS[:1])
    assert names(ask(lm, DOCUMENTS[:1])) == [["Firm0"]]


def test_a_budget_without_prices_is_refused(tmp_path):
    with pytest.raises(ValueError, match="price_in"):
        teacher.connect("m", cache_dir=tmp_path, budget=teacher.Budget(1.0))


def test_the_estimate_sends_nothing_and_knows_the_cache(endpoint, tmp_path):
    lm = connect(endpoint, tmp_path, **priced(9.0))
    ask(lm, DOCUMENTS[:5])
    estimate = teacher.estimate(lm, DOCUMENTS, template=TEMPLATE, output_tokens=20)
    assert (estimate.requests, estimate.cached, estimate.output_tokens) == (7, 5, 140)
    assert 0 < estimate.usd < estimate.usd_at_worst
    assert len(endpoint.bodies) == 5


# -- reports ------------------------------------------------------------------------------------------------------


class Counting:
    """An engine that stops after a number of answers, as a killed process would."""

    def __init__(self, stop: float = math.inf):
        self.stop, self.calls = stop, 0

    def complete(self, request):
        from dspy.lm15 import Message, Response, Usage

        self.calls += 1
        if self.calls > self.stop:
            raise KeyboardInterrupt
        name = request.messages[-1].text.split()[1]
        text = to_json(Report(entities=(Entity(name=name, type="firm"),)))
        return Response(id=None, model="m", message=Message.assistant(text), finish_reason="stop", usage=Usage())


def test_reports_resume_where_a_run_was_stopped(tmp_path):
    path, asked = tmp_path / "reports.jsonl", {"template": TEMPLATE, "path": tmp_path / "reports.jsonl", "threads": 1}
    stopped = Counting(stop=7)
    with pytest.raises(KeyboardInterrupt):
        teacher.write_reports(teacher.connect("m", engine=stopped, cache_dir=tmp_path / "c"), DOCUMENTS, **asked)
    assert not path.exists()
    engine = Counting()
    lm = teacher.connect("m", engine=engine, cache_dir=tmp_path / "c")
    parsed = teacher.write_reports(lm, DOCUMENTS, **asked)
    assert engine.calls == 5 and teacher.usage(lm).cached == 7
    assert evaluation.read_predictions(path) == (DOCUMENTS, parsed)
    assert names(parsed) == [[f"Firm{i}"] for i in range(12)]


def test_answers_survive_a_kill_of_the_process(tmp_path):
    script = (
        f"import os, signal, sys; from pathlib import Path; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_teacher import Counting, DOCUMENTS, ask; from erlib.reports import teacher\n"
        "class Killed(Counting):\n"
        "    def complete(self, request):\n"
        "        if self.calls == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().complete(request)\n"
        f"ask(teacher.connect('m', engine=Killed(), cache_dir=Path({str(tmp_path)!r})), threads=1)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert done.returncode == -9, done.stderr
    rows = sqlite3.connect(tmp_path / "responses.sqlite").execute("SELECT COUNT(*) FROM responses").fetchone()
    assert rows == (5,)


def test_tokens_are_estimated_where_the_engine_reports_none(tmp_path):
    budget = teacher.Budget(price_in=1.0, price_out=1.0)
    lm = teacher.connect("m", engine=Counting(), cache_dir=tmp_path, budget=budget)
    ask(lm, DOCUMENTS[:1])
    spent = teacher.usage(lm)
    assert spent.input_tokens > 0 and spent.output_tokens > 0
    assert spent.usd == pytest.approx((spent.input_tokens + spent.output_tokens) / 1e6)
