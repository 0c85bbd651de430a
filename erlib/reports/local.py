"""A local LM behind DSPy: concurrent requests answered in batches."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from erlib.lm.models import Completion, encode_messages, generate

if TYPE_CHECKING:
    from dspy.lm15 import Request, Response
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# -- DSPy ---------------------------------------------------------------------------------------------------------


class LocalEngine:
    """A DSPy engine over a local LM that answers concurrent requests in batches.

    Use it as `dspy.LM("local", engine=LocalEngine(model, tokenizer), cache=False)`, because DSPy's cache knows
    the name, not the weights. One caller at a time leads: it waits a moment for others, then generates for all that
    wait alike. An answer ends at the end token or at a stop that the request names, as a frontier's does: chatter and
    a blank line may stand before the report.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_new_tokens: int = 512,
        batch_size: int = 32,
        wait_seconds: float = 0.02,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.batch_size, self.wait_seconds = max_new_tokens, batch_size, wait_seconds
        self._waiting: list[tuple[Request, Future[Response]]] = []
        self._list, self._lead = threading.Lock(), threading.Lock()

    def complete(self, request: "Request") -> "Response":
        """Answer one request; blocks until the batch that it joined is done."""
        future: Future[Response] = Future()
        with self._list:
            self._waiting.append((request, future))
        while not future.done():
            with self._lead:
                if not future.done():
                    time.sleep(self.wait_seconds)
                    self._answer(self._take())
        return future.result()

    def _take(self) -> "list[tuple[Request, Future[Response]]]":
        """Take the oldest request and those that want the same settings."""
        with self._list:
            first = self._settings(self._waiting[0][0])
            alike = [item for item in self._waiting if self._settings(item[0]) == first]
            others = [item for item in self._waiting if self._settings(item[0]) != first]
            self._waiting = alike[self.batch_size :] + others
        return alike[: self.batch_size]

    def _settings(self, request: "Request") -> tuple:
        config = request.config
        limit = config.max_tokens or self.max_new_tokens
        return limit, config.temperature or 0.0, config.seed or 0, tuple(config.stop)

    def _answer(self, batch: "list[tuple[Request, Future[Response]]]") -> None:
        limit, temperature, seed, stop = self._settings(batch[0][0])
        try:
            completions = generate(
                self.model,
                self.tokenizer,
                [encode_messages(self.tokenizer, _messages(request)) for request, _ in batch],
                max_new_tokens=limit,
                batch_size=self.batch_size,
                temperature=temperature,
                seed=seed,
                stop=stop,
            )
        except Exception as error:  # every caller of the batch must hear of it
            for _, future in batch:
                future.set_exception(error)
            return
        for (request, future), completion in zip(batch, completions, strict=True):
            future.set_result(_response(request, completion))


def _messages(request: "Request") -> list[dict[str, str]]:
    system = [{"role": "system", "content": _content(request.system)}] if request.system else []
    return system + [{"role": message.role, "content": _content(message.parts)} for message in request.messages]


def _content(parts: "str | Sequence") -> str:
    return parts if isinstance(parts, str) else "".join(part.text for part in parts)


def _response(request: "Request", completion: Completion) -> "Response":
    from dspy.lm15 import Message, Response, Usage

    return Response(
        id=None,
        model=request.model,
        message=Message.assistant(completion.text or " "),  # DSPy raises on an empty answer before it is parsed
        finish_reason="stop" if completion.finished else "length",
        usage=Usage(input_tokens=completion.n_prompt_tokens, output_tokens=completion.n_new_tokens),
    )
