"""An exported model as an OpenAI-compatible endpoint on loopback: transformers' own server, told what it serves.

The server lists the models of a hub cache, which an offline machine has not, and answers chat with a template, which
a completion model has not: both are answered here.
"""

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erlib.serving import export

if TYPE_CHECKING:
    from transformers.cli.serve import Serve


def refuse_port_in_use(port: int) -> None:
    """Raise OSError where something listens at this port of the loopback interface."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except OSError as error:
            raise OSError(
                f"port {port} cannot be used ({error.strerror}): stop what listens there, or set --port"
            ) from None


def serve(model: Path, port: int) -> None:
    """Serve until interrupted. Raises OSError for a port in use before the model is loaded, and for no model."""
    settings = export.read_settings(model)
    refuse_port_in_use(port)
    server = _prepared(model, port)
    _answer_here(server, model, settings)
    server.server.run()


def _prepared(model: Path, port: int) -> "Serve":
    """transformers' server with the model loaded, not yet running."""
    from transformers.cli.serve import Serve

    class Prepared(Serve):
        def start_server(self) -> None:
            """Let `serve` start it, when its routes are complete."""

    return Prepared(
        force_model=str(model), host="127.0.0.1", port=port, device="auto", log_level="warning", non_blocking=True
    )


def _answer_here(server: "Serve", model: Path, settings: export.Settings) -> None:
    from fastapi.responses import JSONResponse
    from transformers import AutoTokenizer

    app = server.server.config.app
    own = {"/v1/models": "GET"}
    if not AutoTokenizer.from_pretrained(model).chat_template:
        own["/v1/chat/completions"] = "POST"
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") not in own]

    def models() -> Any:
        made = int((model / "config.json").stat().st_mtime)
        return {"object": "list", "data": [{"id": str(model), "object": "model", "created": made, "owned_by": "erlib"}]}

    def chat() -> Any:
        message = (
            "this model has no chat form: send POST /v1/completions with `prompt`, which is the document in the prompt "
            f"that it was trained on: {settings.prompt!r}"
        )
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": "no_chat_template"}
        return JSONResponse({"error": error}, status_code=400)

    app.add_api_route("/v1/models", models, methods=["GET"])
    if "/v1/chat/completions" in own:
        app.add_api_route("/v1/chat/completions", chat, methods=["POST"])
