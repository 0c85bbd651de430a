"""The meter around an LM that is paid for: cache, budget, pace, retries, and what is charged for nothing."""

import threading
import time

import pytest
from servers import report_of

from erlib.reports.endpoint import EndpointError, Slow, Unanswered, Unavailable
from erlib.reports.meter import Budget, BudgetExceeded, Interrupted, Limits, Meter, Pace


def request(text="Ardox is hiring.", **config):
    from dspy.lm15 import Config, Message, Request

    messages = (Message.user(f"Document:\n{text}\nReport:"),)
    return Request(model="frontier", messages=messages, system="Report.", config=Config(**{"max_tokens": 50} | config))


def response(text, finish="stop", tokens=(100, 20), **more):
    from dspy.lm15 import Message, Response, Usage

    usage = Usage(input_tokens=tokens[0], output_tokens=tokens[1])
    message = Message.assistant(text)
    return Response(id=None, model="m", message=message, finish_reason=finish, usage=usage, **more)


class Scripted:
    """An engine that does one thing of its script after the other, then answers."""

    def __init__(self, *script):
        self.script, self.requests, self.lock = list(script), [], threading.Lock()

    def complete(self, asked):
        with self.lock:
            self.requests.append(asked)
            turn = self.script.pop(0) if self.script else None
        if isinstance(turn, BaseException):
            raise turn
        if callable(turn):
            return turn()
        body = {"messages": [{"content": asked.messages[-1].text}]}
        return response(report_of(body)) if turn is None else turn


def meter(engine, folder=None, *, budget=None, **limits):
    limits = Limits(**{"backoff": 0.001} | limits)
    return Meter(
        engine, source="m", cache_dir=folder, budget=budget or Budget(price_in=1e4, price_out=1e4), limits=limits
    )


DOLLARS = 1.2  # of an answer of 120 tokens


# -- attempts -----------------------------------------------------------------------------------------------------


def test_a_fault_of_the_moment_is_tried_again():
    engine = Scripted(Unavailable("busy"), Slow("slow"))
    asked = meter(engine)
    assert "Ardox" in asked.complete(request()).text
    assert (asked.usage.retries, asked.usage.requests, asked.usage.unanswered) == (2, 1, 0)


def test_a_fault_that_stays_leaves_the_request_unanswered_with_the_last_words():
    engine = Scripted(*[Unavailable("busy")] * 9)
    asked = meter(engine, attempts=3)
    with pytest.raises(Unanswered, match=r"busy \(3 attempts\)") as caught:
        asked.complete(request())
    assert caught.value.reason == "no answer"
    assert len(engine.requests) == 3 and asked.usage.unanswered == 1
    assert "Ardox" in meter(Scripted()).complete(request()).text  # it is not remembered as an answer


@pytest.mark.parametrize("fault", [Unanswered("filtered", "no"), EndpointError("no key"), LookupError("a bug")])
def test_any_other_fault_is_raised_at_once(fault):
    engine = Scripted(fault, fault)
    with pytest.raises(type(fault)):
        meter(engine).complete(request())
    assert len(engine.requests) == 1


def test_a_rate_limit_is_no_attempt_while_others_are_answered():
    """A slow quota lets one request through a minute: who waits long must not be given up."""
    limited = Unavailable("rate limit", retry_after=0.001)
    asked = meter(Scripted(), attempts=2)

    def others_are_answered():
        asked.usage.requests += 1
        raise limited

    asked.engine.script = [others_are_answered] * 7
    assert "Ardox" in asked.complete(request()).text
    asked.engine.script = [limited] * 7
    with pytest.raises(Unanswered, match="2 attempts"):
        asked.complete(request("Belum is hiring."))


def test_a_server_of_one_slot_that_never_notices_who_has_gone_is_waited_for():
    """Sixteen at once: those at the end of its queue are given up, and their answers are made all the same."""
    slot, given_up = threading.Lock(), threading.Event()

    class OneSlot(Scripted):
        def complete(self, asked):
            began = time.monotonic()
            with slot:
                time.sleep(0.02)
            if time.monotonic() - began > 0.1:
                given_up.set()
                raise Slow("it took too long")
            return super().complete(asked)

    asked = meter(OneSlot(), concurrency=16, attempts=3, backoff=0.05)
    found = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(asked.complete(request(f"Ardox{n} is hiring.")).text))
        for n in range(32)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 32 and asked.usage.unanswered == 0 and given_up.is_set()


def test_a_pause_that_the_server_asks_for_holds_for_requests_that_have_not_started():
    asked = meter(Scripted(Unavailable("rate limit", retry_after=0.2)))
    began = time.monotonic()
    first = threading.Thread(target=asked.complete, args=(request(),))
    first.start()
    while not asked.usage.retries:
        time.sleep(0.001)
    asked.complete(request("Belum is hiring."))
    first.join()
    assert time.monotonic() - began >= 0.2


def test_an_answer_that_uses_up_the_limit_makes_the_next_request_wait():
    asked = meter(Scripted(response("{}", provider_data={"pause": 0.2})))
    began = time.monotonic()
    asked.complete(request())
    asked.complete(request("Belum is hiring."))
    assert time.monotonic() - began >= 0.2


# -- cut off, empty, unanswered: what it costs ---------------------------------------------------------------------


def test_an_answer_that_is_cut_off_is_asked_for_once_more_with_more_room(tmp_path):
    engine = Scripted(response('{"ent', "length"))
    asked = meter(engine, tmp_path)
    assert "Ardox" in asked.complete(request()).text
    assert [each.config.max_tokens for each in engine.requests] == [50, 200]
    assert asked.usage.usd == pytest.approx(2 * DOLLARS)
    again = meter(Scripted(), tmp_path, budget=Budget(3.0, price_in=1e4, price_out=1e4))
    assert again.complete(request()).text and again.usage.cached == 1
    with pytest.raises(BudgetExceeded, match=r"\$2\.4"):  # what was paid for the part that is of no use counts
        again.complete(request("Belum is hiring."))


def test_a_model_that_thinks_before_it_answers_gets_more_room_from_then_on():
    engine = Scripted(response(" ", "length"))
    asked = meter(engine)
    for name in ("Ardox", "Belum"):
        assert name in asked.complete(request(f"{name} is hiring.")).text
    assert [each.config.max_tokens for each in engine.requests] == [50, 200, 200]


def test_an_answer_that_stays_cut_off_is_unanswered_and_never_bought_again(tmp_path):
    engine = Scripted(response("{", "length"), response('{"ent', "length"))
    for _ in range(2):
        asked = meter(engine, tmp_path)
        with pytest.raises(Unanswered, match="cut off") as caught:
            asked.complete(request())
        assert caught.value.reason == "cut off" and asked.usage.unanswered == 1
    assert len(engine.requests) == 2


def test_what_was_charged_for_nothing_counts_against_the_budget(tmp_path):
    engine = Scripted(Unavailable("an empty answer", tokens=(100, 20)), Unanswered("filtered", "no", tokens=(100, 20)))
    asked = meter(engine, tmp_path)
    with pytest.raises(Unanswered):
        asked.complete(request())
    assert asked.usage.usd == pytest.approx(2 * DOLLARS)
    with pytest.raises(BudgetExceeded, match=r"\$2\.4"):
        meter(engine, tmp_path, budget=Budget(2.5, price_in=1e4, price_out=1e4)).complete(request())


def test_an_empty_answer_in_an_old_cache_is_asked_for_again(tmp_path):
    asked = meter(Scripted(), tmp_path)
    asked._cache.put(asked.key(request()), " ", "stop", 100, 20, DOLLARS)
    assert "Ardox" in asked.complete(request()).text
    assert meter(Scripted(), tmp_path)._spent == pytest.approx(2 * DOLLARS)


@pytest.mark.parametrize("tokens", [(None, None), (None, 20), (100, None)])
def test_tokens_that_the_server_did_not_count_are_estimated_and_the_budget_holds(tokens):
    text = "Ardox " * 25  # 150 bytes out, about 38 tokens
    engine = Scripted(*[response(text, tokens=tokens)] * 40)
    asked = meter(engine, budget=Budget(9.0, price_in=1e4, price_out=1e4))
    with pytest.raises(BudgetExceeded):
        for number in range(40):
            asked.complete(request(f"Ardox{number} is hiring."))
    assert asked.usage.estimated == asked.usage.requests >= 2
    assert 0 < asked.usage.usd <= 9.0
    assert f"{asked.usage.estimated} of them estimated" in str(asked.usage)


# -- pace ---------------------------------------------------------------------------------------------------------


def test_requests_are_spaced_by_the_rates_that_are_allowed():
    pace = Pace(Limits(requests_per_minute=600.0))  # one in a tenth of a second
    began = time.monotonic()
    for _ in range(4):
        with pace.turn(10):
            pass
    assert time.monotonic() - began >= 0.3


def test_long_requests_take_more_of_the_tokens_a_minute():
    pace = Pace(Limits(tokens_per_minute=60_000.0))
    began = time.monotonic()
    for tokens in (300, 10):
        with pace.turn(tokens):
            pass
    assert time.monotonic() - began >= 0.3


def test_a_server_that_is_too_slow_gets_fewer_requests_at_once():
    pace = Pace(Limits(concurrency=2))
    pace.slow_down()

    def take_a_turn():
        with pace.turn(1):
            pass

    second = threading.Thread(target=take_a_turn, daemon=True)
    with pace.turn(1):
        second.start()
        second.join(0.05)
        assert second.is_alive()
    second.join(10)
    assert not second.is_alive()


def test_an_interruption_wakes_whoever_waits_and_nobody_else():
    pace = Pace(Limits())
    pace.pause(60.0)
    raised = []

    def wait():
        try:
            with pace.turn(1):
                pass
        except Interrupted:
            raised.append(1)

    waiting = [threading.Thread(target=wait) for _ in range(3)]
    for thread in waiting:
        thread.start()
    while pace._under_way < 3:
        time.sleep(0.001)
    pace.interrupt()
    for thread in waiting:
        thread.join(10)
    assert raised == [1, 1, 1]
    later = Pace(Limits())
    later.interrupt()
    with later.turn(1):  # an interruption that is past concerns nobody
        pass
