"""An OpenAI-compatible chat endpoint as a DSPy engine: servers differ in what they take, and in how they say no.

1. A request that names something the server does not take (temperature, the name of the token limit, a JSON schema, a
   system message) is sent again without it or in the other form, and so are all requests after it (`Dialect`).
2. A success that holds no answer is a fault of the server, not an answer: no choices, an error in the body, no text.
3. Every fault says status, URL and the server's own words, and whether it concerns the moment (`Unavailable`), this
   one request (`Unanswered`) or every request (`EndpointError`).

The API key comes from `OPENAI_API_KEY`; it is sent to the endpoint, and never shown or stored.
"""

import json
import os
import re
import threading
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal

import httpx

if TYPE_CHECKING:
    from dspy.lm15 import Request, Response

OPENAI = "https://api.openai.com/v1"
Reason = Literal["filtered", "refused", "too long", "cut off", "empty", "no answer"]


class Fault(RuntimeError):
    """What went wrong with a request; `tokens` (in, out) where the server counted some, `retry_after` in seconds."""

    def __init__(self, message: str, *, tokens: tuple[int, int] = (0, 0), retry_after: float | None = None):
        super().__init__(message)
        self.tokens, self.retry_after = tokens, retry_after


class Unavailable(Fault):
    """The server is busy, broken or slow: the same request may be answered later."""


class Slow(Unavailable):
    """The server took the request and did not answer in time."""


class Unanswered(Fault):
    """This request is not going to be answered, whatever others are; `reason` names the kind."""

    def __init__(self, reason: Reason, message: str, **more: Any):
        super().__init__(message, **more)
        self.reason = reason


class EndpointError(Fault):
    """No request is going to be answered: key, model, URL or account are wrong."""


class Dialect:
    """What one server takes, learned from what it refused; safe to share between threads."""

    _LIMITS = ("max_tokens", "max_completion_tokens", "")  # names of the token limit, in the order they are tried
    _FORMATS = ("json_schema", "json_object", "")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._limit = self._format = 0
        self._left_out: set[str] = set()
        self._folds_system = False

    def __str__(self) -> str:
        """What differs from the plain request, in words; empty where nothing does."""
        said = [f"{name} left out" for name in sorted(self._left_out)]
        if self._limit:
            said.append(f"token limit as {self._LIMITS[self._limit] or 'the server sets it'}")
        if self._format:
            said.append(f"response format {self._FORMATS[self._format] or 'left out'}")
        if self._folds_system:
            said.append("instructions inside the first message")
        return ", ".join(said)

    def body(self, plain: Mapping[str, Any]) -> dict[str, Any]:
        """Word a plain request for the server; it has `max_tokens`, a JSON schema, a system message."""
        with self._lock:
            body = {name: value for name, value in plain.items() if name not in self._left_out}
            limit = body.pop("max_tokens", None)
            if limit is not None and self._LIMITS[self._limit]:
                body[self._LIMITS[self._limit]] = limit
            wanted = body.pop("response_format", None)
            if wanted is not None and self._FORMATS[self._format]:
                body["response_format"] = {"type": "json_object"} if self._format else wanted
            if self._folds_system:
                body["messages"] = _folded(body["messages"])
            return body

    def adapt(self, plain: Mapping[str, Any], refused: Mapping[str, Any], words: str) -> bool:
        """Learn from a refusal; False where it names nothing that could be sent in another way."""
        if self.body(plain) != refused:
            return True  # another request has taught it meanwhile
        with self._lock:
            named = [name for name in refused if name not in ("model", "messages") and _names(words, name)]
            if any(name in self._LIMITS for name in named):
                self._limit += 1
            elif "response_format" in named or ("response_format" in refused and _names(words, "json_schema")):
                self._format += 1
            elif named:
                self._left_out.update(named)
            elif not self._folds_system and refused["messages"][0]["role"] == "system" and _SYSTEM.search(words):
                self._folds_system = True
            else:
                return False
            return True


def _names(words: str, field: str) -> bool:
    return re.search(rf"(?<![a-z_]){field}(?![a-z_])", words, re.IGNORECASE) is not None


_SYSTEM = re.compile(r"\bsystem\b|\broles?\b", re.IGNORECASE)


def _folded(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Put the system text in front of the first user message."""
    system, first, *others = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *others]


class Endpoint:
    """The chat completions of one model at one server (`complete`): a DSPy engine that is safe to call from threads."""

    def __init__(
        self,
        model: str,
        api_base: str = "",
        *,
        timeout: float,
        schema: Mapping[str, Any] | None = None,
    ):
        base = (api_base or OPENAI).rstrip("/").removesuffix("/chat/completions")
        if not re.match(r"https?://[^/]", base):
            raise ValueError(f"api_base = {api_base!r} is no URL: write http://host:port/v1 or https://host/v1")
        self.model, self.url, self.dialect = model, f"{base}/chat/completions", Dialect()
        self._timeout, self._schema = timeout, schema
        self._client = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0), pool=None),
            limits=httpx.Limits(max_connections=None),
        )

    def complete(self, request: "Request") -> "Response":
        """Answer one request; raises `Unavailable`, `Unanswered` or `EndpointError`."""
        plain = self._plain(request)
        while True:
            body = self.dialect.body(plain)
            reply = self._post(body)
            if reply.is_success:
                return self._answer(reply)
            if reply.is_redirect:
                raise EndpointError(f"{self.url} has moved to {reply.headers.get('location')}: set `api_base` to it")
            words = said(reply)
            told = f"{reply.status_code} from {self.url}: {words}"
            if reply.status_code not in _DISPUTABLE or _ABOUT_TEXT.search(words):
                raise fault(reply.status_code, told, words, retry_after=asked_pause(reply.headers))
            if not self.dialect.adapt(plain, body, words):
                raise fault(reply.status_code, told, words)

    def _plain(self, request: "Request") -> dict[str, Any]:
        turns = [{"role": message.role, "content": message.text or ""} for message in request.messages]
        system = [{"role": "system", "content": str(request.system)}] if request.system else []
        config = request.config
        settings = {
            "max_tokens": config.max_tokens,
            "temperature": config.temperature,
            "seed": config.seed,
            "stop": list(config.stop) or None,
            "response_format": self._schema and {"type": "json_schema", "json_schema": self._schema},
        }
        wanted = {name: value for name, value in settings.items() if value is not None}
        return {"model": self.model, "messages": system + turns, "stream": False, **wanted}

    def _post(self, body: dict[str, Any]) -> httpx.Response:
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not key and self.url.startswith(OPENAI):
            raise EndpointError(
                "OpenAI's endpoint wants a key: set the environment variable OPENAI_API_KEY, or set `api_base` to the "
                "URL of another endpoint"
            )
        try:
            return self._client.post(self.url, json=body, headers={"Authorization": f"Bearer {key}"} if key else {})
        except httpx.ConnectError as error:
            raise Unavailable(
                f"nothing answers at {self.url} ({error}): is the server up, is `api_base` right?"
            ) from None
        except httpx.ConnectTimeout:
            raise Unavailable(f"no connection to {self.url} within {min(self._timeout, 10.0):g} s") from None
        except httpx.TimeoutException:
            raise Slow(
                f"{self.url} took the request and did not answer within {self._timeout:g} s: the server is slow, not "
                "dead; raise `timeout` or lower `threads`"
            ) from None
        except httpx.TransportError as error:
            raise Unavailable(f"the connection to {self.url} broke: {error}") from None
        except (httpx.InvalidURL, UnicodeError) as error:
            raise EndpointError(f"{self.url} cannot be asked: {error}") from None

    def _answer(self, reply: httpx.Response) -> "Response":
        """Read a success: an answer with its usage, or the fault that hides in it."""
        from dspy.lm15 import Message, Response, Usage

        found = _streamed(reply.text) if "text/event-stream" in reply.headers.get("content-type", "") else _json(reply)
        where = f"{reply.status_code} from {self.url}"
        if not isinstance(found, dict):
            raise Unavailable(f"{where}: not a JSON object but {reply.text[:200]!r}")
        usage = found.get("usage") if isinstance(found.get("usage"), dict) else {}
        tokens = (count(usage.get("prompt_tokens")), count(usage.get("completion_tokens")))
        choices = found.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
        if choice is None:
            words = said(reply)
            raise fault(_status_inside(found), f"{where}, but with no answer: {words}", words, tokens=tokens)
        message = choice.get("message") if isinstance(choice.get("message"), dict) else {}
        text, finish = _text(message.get("content", choice.get("text"))), str(choice.get("finish_reason")).lower()
        if "filter" in finish or "safety" in finish:
            raise Unanswered("filtered", f"{where}: the server's filter ended the answer ({finish})", tokens=tokens)
        if not text.strip() and message.get("refusal"):
            raise Unanswered("refused", f"{where}: the model refused: {_text(message['refusal'])[:300]}", tokens=tokens)
        finish = "length" if finish in ("length", "max_tokens", "model_length") else "stop"
        if not text.strip() and finish == "stop":
            raise Unavailable(f"{where}, but with an empty answer", tokens=tokens)
        return Response(
            id=None,
            model=self.model,
            message=Message.assistant(text or " "),
            finish_reason=finish,
            usage=Usage(input_tokens=tokens[0] or None, output_tokens=tokens[1] or None),
            provider_data={"pause": exhausted_for(reply.headers)},  # seconds until the server wants the next request
        )


# -- what servers say ---------------------------------------------------------------------------------------------

_DISPUTABLE = (400, 404, 409, 415, 422)  # statuses that may be about one field of a request
_PASSING = (408, 409, 425, 429, 498, 499)  # beside all of 500 and above
_FATAL = (401, 402, 403, 404, 405, 407, 410)
_FILTERED = re.compile(r"content.?(filter|polic|management)|safety|flagged|moderation|prohibited", re.IGNORECASE)
_TOO_LONG = re.compile(
    r"context.?(length|window|size)|maximum (context|input|prompt|sequence)"
    r"|(prompt|input|request)\b.{0,40}too (long|large)|too many (input )?tokens|exceeds?\b.{0,60}\btokens",
    re.IGNORECASE,
)
_ABOUT_TEXT = re.compile(f"{_FILTERED.pattern}|{_TOO_LONG.pattern}", re.IGNORECASE)
_NO_MONEY = re.compile(r"insufficient.?(quota|credit|balance|funds)|billing|payment", re.IGNORECASE)


def fault(
    status: int, told: str, words: str, *, tokens: tuple[int, int] = (0, 0), retry_after: float | None = None
) -> Fault:
    """The fault that a status and the server's words stand for."""
    more: dict[str, Any] = {"tokens": tokens, "retry_after": retry_after}
    if _FILTERED.search(words) and status < 500 and status not in (401, 429):
        return Unanswered("filtered", told, **more)
    if status == 413 or (status < 500 and status != 429 and _TOO_LONG.search(words)):
        return Unanswered("too long", told, **more)
    if status in (401, 402, 403, 429) and _NO_MONEY.search(words):
        return EndpointError(f"{told} (the account has no money or quota left)", **more)
    if status >= 500 or status in _PASSING:
        return Unavailable(told, **more)
    if status in _FATAL:
        return EndpointError(told + _ADVICE.get(status, ""), **more)
    return Unanswered("refused", told, **more)


_ADVICE = {
    401: " (the key in the environment variable OPENAI_API_KEY is missing or wrong)",
    404: " (check the name in `frontier`, and `api_base`: most servers have their API below /v1)",
    405: " (check `api_base`: most servers have their API below /v1)",
}


def said(reply: httpx.Response) -> str:
    """A server's own words about a fault: of `error`, `detail` or `message`, or the start of the body."""
    found = _json(reply)
    words = "; ".join(_words(found)) if isinstance(found, dict | list) else " ".join(str(reply.text).split())
    return words[:500] or "no words"


def _words(found: Any, key: str = "") -> list[str]:
    """Every text of an error's body with the names of fields that it concerns, in the order of the body."""
    if isinstance(found, dict):
        return [words for name, value in found.items() for words in _words(value, name)]
    if isinstance(found, list):
        if found and all(isinstance(part, str | int) for part in found):
            return [".".join(map(str, found))]  # a location such as body.max_tokens
        return [words for part in found for words in _words(part, key)]
    if key in ("id", "created", "object", "model", "usage") or found is None or not str(found).strip():
        return []
    return [f"{key} {found}" if key in ("param", "code", "status") else str(found)]


def _json(reply: httpx.Response) -> Any:
    try:
        return json.loads(reply.text)
    except (ValueError, RecursionError):
        return None


def _status_inside(found: Mapping[str, Any]) -> int:
    """The status that an error inside a success names; 500 where it names none: asking again may help."""
    error = found.get("error")
    code = error.get("code", error.get("status")) if isinstance(error, dict) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 500


def _streamed(text: str) -> dict[str, Any] | None:
    """Put together what a server streamed although it was asked not to; None where there is nothing to read."""
    events = [line.removeprefix("data:").strip() for line in text.splitlines() if line.startswith("data:")]
    try:
        chunks = [json.loads(event) for event in events if event != "[DONE]"]
        choices = [chunk["choices"][0] for chunk in chunks if chunk.get("choices")]
        content = "".join(_text(choice.get("delta", {}).get("content")) for choice in choices)
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
    ends = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    usage = next((chunk["usage"] for chunk in chunks if chunk.get("usage")), None)
    if not ends:
        return None  # broken off
    return {"choices": [{"message": {"content": content}, "finish_reason": ends[-1]}], "usage": usage}


def _text(content: Any) -> str:
    """The text of a message's content: a text, or a list of parts of which those with text count."""
    if isinstance(content, list):
        return "".join(_text(part.get("text") if isinstance(part, dict) else part) for part in content)
    return content if isinstance(content, str) else ""


def count(value: Any) -> int:
    """A number of tokens as servers write it; 0 where it is none: missing, negative, not a number, past belief."""
    try:
        number = float(value) if not isinstance(value, bool) else 0.0
    except (TypeError, ValueError):
        return 0
    return int(number) if 0 < number < 1e9 and number == int(number) else 0


# -- pauses that servers ask for ----------------------------------------------------------------------------------

_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def asked_pause(headers: Mapping[str, str]) -> float | None:
    """Seconds that a refusal asks to wait (`retry-after-ms`, `Retry-After` as seconds or date); None if it does not."""
    if (milliseconds := seconds(headers.get("retry-after-ms", ""))) is not None:
        return milliseconds / 1000
    given = headers.get("retry-after", "")
    if (asked := seconds(given)) is not None:
        return asked
    try:
        return max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
    except (TypeError, ValueError):
        return exhausted_for(headers) or None


def exhausted_for(headers: Mapping[str, str]) -> float:
    """Seconds until `x-ratelimit-reset-*` of what `x-ratelimit-remaining-*` says is used up; 0 where nothing is."""
    pauses = [0.0]
    for kind in ("", "-requests", "-tokens"):
        remaining = seconds(headers.get(f"x-ratelimit-remaining{kind}", ""))
        reset = seconds(headers.get(f"x-ratelimit-reset{kind}", ""))
        if remaining is not None and remaining <= 0 and reset is not None:
            pauses.append(reset)
    return max(pauses)


def seconds(text: str) -> float | None:
    """A duration as servers write it: `2`, `0.5`, `350ms`, `6m0s`, or a moment since 1970; None for anything else."""
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text)
    if parts and "".join(number + unit for number, unit in parts) == text.strip():
        return sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not re.fullmatch(r"\s*\d+(\.\d+)?\s*", text):
        return None
    number = float(text)
    moment = number / 1000 if number > 1e11 else number
    return max(0.0, moment - time.time()) if moment > 1e9 else number
