"""The endpoint engine against loopback servers that take less than everything, and fail as real ones do."""

import json
import threading

import pytest
from servers import USAGE, answer, good, report_of

from erlib.reports import prompts
from erlib.reports.endpoint import Endpoint, EndpointError, Slow, Unanswered, Unavailable, count, seconds

SYSTEM = "Report the firms."


def request(text="Ardox is hiring.", **config):
    from dspy.lm15 import Config, Message, Request

    settings = {"max_tokens": 50, "temperature": 0.0} | config
    messages = (Message.user(f"Document:\n{text}\nReport:"),)
    return Request(model="frontier", messages=messages, system=SYSTEM, config=Config(**settings))


def connected(server, **more):
    return Endpoint("large:v1", server.url, **{"timeout": 5.0} | more)


def refused(words, status=400):
    return status, {}, {"error": {"message": words}}


# -- what is sent -------------------------------------------------------------------------------------------------


def test_a_server_that_takes_everything_gets_everything(serve):
    server = serve(lambda body, n: good(body))
    schema = prompts.schema_of_reports()
    response = connected(server, schema=schema).complete(request(seed=3, stop=("\n\n",)))
    assert "Ardox" in response.text
    assert response.finish_reason == "stop"
    assert (response.usage.input_tokens, response.usage.output_tokens) == (100, 20)
    body = server.bodies[0]
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    wanted = {"model": "large:v1", "max_tokens": 50, "temperature": 0.0, "seed": 3, "stop": ["\n\n"], "stream": False}
    assert wanted.items() <= body.items()
    assert body["response_format"] == {"type": "json_schema", "json_schema": schema}
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"


def takes_no(field, words="Unsupported parameter: {}", status=400):
    return lambda body, n: refused(words.format(field), status) if field in body else good(body)


@pytest.mark.parametrize("field", ["temperature", "seed", "stop", "stream"])
@pytest.mark.parametrize("words", ["Unsupported value: '{}' does not support this.", "`{}` must be strictly positive"])
def test_a_field_that_is_refused_is_left_out_from_then_on(serve, field, words):
    server = serve(takes_no(field, words, 422))
    engine = connected(server)
    for _ in range(2):
        assert "Ardox" in engine.complete(request(seed=3, stop=("\n\n",))).text
    assert [field in body for body in server.bodies] == [True, False, False]
    assert str(engine.dialect) == f"{field} left out"


@pytest.mark.parametrize(
    ("takes", "words"),
    [
        (
            "max_completion_tokens",
            "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
        ),
        ("nothing", "Extra inputs are not permitted: max_tokens, max_completion_tokens"),
    ],
)
def test_the_token_limit_goes_by_the_name_that_the_server_knows(serve, takes, words):
    def respond(body, n):
        return refused(words) if {"max_tokens", "max_completion_tokens"} & set(body) - {takes} else good(body)

    server = serve(respond)
    assert "Ardox" in connected(server).complete(request()).text
    assert server.bodies[-1].get(takes) == (50 if takes != "nothing" else None)


def test_a_location_names_the_field_as_well_as_words_do(serve):
    detail = [{"type": "extra_forbidden", "loc": ["body", "temperature"], "msg": "Extra inputs are not permitted"}]
    server = serve(lambda body, n: (422, {}, {"detail": detail}) if "temperature" in body else good(body))
    assert "Ardox" in connected(server).complete(request()).text


def test_without_a_schema_the_answer_is_asked_for_as_json_and_without_that_as_text(serve):
    def respond(body, n):
        return refused("This model does not support response_format") if "response_format" in body else good(body)

    server = serve(respond)
    engine = connected(server, schema=prompts.schema_of_reports())
    assert "Ardox" in engine.complete(request()).text
    kinds = [body.get("response_format", {}).get("type") for body in server.bodies]
    assert kinds == ["json_schema", "json_object", None]


def test_instructions_go_into_the_first_message_where_there_is_no_system_role(serve):
    def respond(body, n):
        has_system = body["messages"][0]["role"] == "system"
        return (400, {}, {"message": "System role not supported"}) if has_system else good(body)

    server = serve(respond)
    assert "Ardox" in connected(server).complete(request()).text
    (message,) = server.bodies[-1]["messages"]
    assert message["role"] == "user" and message["content"].startswith(f"{SYSTEM}\n\nDocument:\n")


@pytest.mark.parametrize("ending", ["", "/", "/chat/completions", "/chat/completions/"])
def test_the_url_may_be_written_in_full(serve, ending):
    server = serve(lambda body, n: good(body))
    Endpoint("m", server.url + ending, timeout=5.0).complete(request())
    assert server.paths == ["/v1/chat/completions"]


@pytest.mark.parametrize("url", ["localhost:8000/v1", "http://", "ftp://host/v1"])
def test_what_is_no_url_is_refused_at_once(url):
    with pytest.raises(ValueError, match="api_base"):
        Endpoint("m", url, timeout=5.0)


def test_openai_without_a_key_is_not_asked(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(EndpointError, match="OPENAI_API_KEY"):
        Endpoint("m", timeout=5.0).complete(request())


# -- a success that holds no answer -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        {"choices": [], "usage": USAGE},
        {"choices": None},
        {"choices": [None]},
        {"error": "Rate limit exceeded, please retry shortly"},
        {"error": {"message": "upstream is overloaded", "code": 502}},
        answer(None)[2],
        answer("")[2],
        answer(" \n")[2],
        answer([])[2],
        [],
        "ok",
        b'{"choices": [{"mess',
        b"<html>busy</html>",
        b"",
    ],
)
def test_a_success_without_an_answer_is_a_fault_of_the_moment(serve, payload):
    server = serve(lambda body, n: (200, {}, payload))
    with pytest.raises(Unavailable, match=f"200 from {server.url}"):
        connected(server).complete(request())


def test_what_an_empty_answer_costs_is_known(serve):
    server = serve(lambda body, n: answer(""))
    with pytest.raises(Unavailable) as caught:
        connected(server).complete(request())
    assert caught.value.tokens == (100, 20)


def test_an_error_inside_a_success_counts_as_the_status_that_it_names(serve):
    server = serve(lambda body, n: (200, {}, {"error": {"message": "no such key", "code": 401}}))
    with pytest.raises(EndpointError, match="no such key"):
        connected(server).complete(request())


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (answer("", finish="content_filter"), "filtered"),
        (answer("Ardox", finish="content_filter"), "filtered"),
        (answer(None, refusal="I cannot help with that."), "refused"),
    ],
)
def test_a_refusal_inside_a_success_concerns_this_request(serve, reply, reason):
    with pytest.raises(Unanswered) as caught:
        connected(serve(lambda body, n: reply)).complete(request())
    assert caught.value.reason == reason
    assert caught.value.tokens == (100, 20)


@pytest.mark.parametrize("finish", ["length", "max_tokens", "MAX_TOKENS"])
def test_an_answer_that_is_cut_off_says_so_even_if_all_of_it_was_thinking(serve, finish):
    response = connected(serve(lambda body, n: answer("", finish=finish))).complete(request())
    assert response.finish_reason == "length"


def test_parts_of_an_answer_are_put_together(serve):
    parts = [{"type": "text", "text": "one "}, {"type": "image"}, "two"]
    assert connected(serve(lambda body, n: answer(parts))).complete(request()).text == "one two"


def chunks(body, *, end=True):
    text = report_of(body)
    rows = [{"choices": [{"delta": {"content": part}}]} for part in (text[:5], text[5:])]
    rows += [{"choices": [{"delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": USAGE}] if end else []
    events = b"".join(b"data: " + json.dumps(row).encode() + b"\n\n" for row in rows)
    return 200, {"Content-Type": "text/event-stream"}, events + b"data: [DONE]\n\n"


def test_a_stream_that_nobody_asked_for_is_put_together(serve):
    response = connected(serve(lambda body, n: chunks(body))).complete(request())
    assert "Ardox" in response.text and response.usage.output_tokens == 20


def test_a_stream_that_broke_off_is_no_answer(serve):
    with pytest.raises(Unavailable):
        connected(serve(lambda body, n: chunks(body, end=False))).complete(request())


@pytest.mark.parametrize(
    "usage", [None, {}, {"prompt_tokens": 0, "completion_tokens": 0}, {"prompt_tokens": -4}, [1], "x"]
)
def test_tokens_that_are_not_counted_are_unknown_not_free(serve, usage):
    response = connected(serve(lambda body, n: answer("Ardox", usage=usage))).complete(request())
    assert response.usage.input_tokens is None and response.usage.output_tokens is None


def test_numbers_of_tokens_are_read_as_servers_write_them():
    assert [count(value) for value in (7, 7.0, "7", " 7 ")] == [7, 7, 7, 7]
    assert [count(value) for value in (None, True, -7, 7.5, "many", float("nan"), float("inf"), 1e30, [], {})] == [
        0
    ] * 10


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "words", "kind"),
    [
        (400, "The response was filtered due to our content management policy.", "filtered"),
        (403, "Your input was flagged by moderation", "filtered"),
        (
            400,
            "This model's maximum context length is 4096 tokens. Please reduce max_tokens or the messages",
            "too long",
        ),
        (413, "Payload Too Large", "too long"),
        (422, "the text is of no known language", "refused"),
    ],
)
def test_a_refusal_of_one_request_says_why_in_the_words_of_the_server(serve, status, words, kind):
    server = serve(lambda body, n: refused(words, status))
    with pytest.raises(Unanswered, match=f"{status} from {server.url}/chat/completions: {words[:20]}") as caught:
        connected(server).complete(request())
    assert caught.value.reason == kind
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "body", [{"error": "why"}, {"error": {"message": "why"}}, {"detail": "why"}, {"message": "why"}]
)
@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_what_no_request_would_get_past_is_told_apart(serve, status, body):
    server = serve(lambda _, n: (status, {}, body))
    with pytest.raises(EndpointError, match=f"{status} from {server.url}/chat/completions: why"):
        connected(server).complete(request())


def test_who_has_moved_says_where_to(serve):
    server = serve(lambda _, n: (308, {"Location": "https://example.org/v1/chat/completions"}, b""))
    with pytest.raises(EndpointError, match=r"moved to https://example.org/.*api_base"):
        connected(server).complete(request())


def test_a_key_read_from_a_file_may_end_with_a_line_end(serve, monkeypatch):
    server = serve(lambda body, n: good(body))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    connected(server).complete(request())
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"


def test_an_account_without_money_is_no_rate_limit(serve):
    server = serve(lambda body, n: refused("You exceeded your current quota", 429))
    with pytest.raises(Unavailable):
        connected(server).complete(request())
    server.respond = lambda body, n: (429, {}, {"error": {"message": "exceeded", "code": "insufficient_quota"}})
    with pytest.raises(EndpointError, match="money"):
        connected(server).complete(request())


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
def test_a_busy_or_broken_server_may_answer_later(serve, status):
    with pytest.raises(Unavailable, match=f"{status} from .*: why"):
        connected(serve(lambda body, n: refused("why", status))).complete(request())


@pytest.mark.parametrize(
    ("headers", "pause"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "7200"}, 7200.0),
        ({"retry-after-ms": "350"}, 0.35),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m30s"}, 90.0),
        ({"Retry-After": "soon"}, None),
        ({}, None),
    ],
)
def test_a_refusal_says_how_long_to_wait(serve, headers, pause):
    with pytest.raises(Unavailable) as caught:
        connected(serve(lambda body, n: (429, headers, {"error": "busy"}))).complete(request())
    assert caught.value.retry_after == pause


def test_an_answer_says_when_the_limit_is_used_up(serve):
    headers = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6s"}
    response = connected(serve(lambda body, n: (200, headers, good(body)[2]))).complete(request())
    assert response.provider_data["pause"] == 6.0


def test_durations_are_read_as_servers_write_them():
    assert [seconds(text) for text in ("2", "0.5", "500ms", "6m0s", "1h2m3s")] == [2.0, 0.5, 0.5, 360.0, 3723.0]
    assert [seconds(text) for text in ("", "soon", "-3", "5 apples", "nan")] == [None] * 5
    assert seconds("1") == 1.0 and seconds("1000000001") == 0.0  # a moment that is past


def test_a_slow_server_is_told_apart_from_a_dead_one(serve):

    held = threading.Event()
    slow = serve(lambda body, n: (held.wait(30), good(body))[1])
    with pytest.raises(Slow, match="timeout"):
        connected(slow, timeout=0.2).complete(request())
    held.set()
    dead = serve(lambda body, n: good(body))
    dead.shutdown()
    dead.server_close()
    with pytest.raises(Unavailable, match="nothing answers") as caught:
        connected(dead).complete(request())
    assert not isinstance(caught.value, Slow)
