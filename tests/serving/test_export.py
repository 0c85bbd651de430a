"""An exported folder is whole, says how it is asked, and works with the commands that its card shows."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from erlib.lm import models
from erlib.lm.checkpoints import fingerprint, require_merged
from erlib.serving import export, server
from erlib.task.forms import ask

PROMPT = ask("{text}") + "\n"
MANIFEST = {
    "phase": "03_sft",
    "simulated": True,
    "verdict": [
        {"check": "F1 | all", "value": 0.51234, "low": 0.4, "high": 0.6, "target": ">= 0.8", "outcome": "missed"},
        {"check": "rows", "value": 7, "low": None, "high": None, "target": None, "outcome": None},
    ],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "merged"
    shutil.copytree(models.EMBEDDED, folder)
    (folder / "merge.json").write_text(json.dumps({"merged": fingerprint(folder)}))
    (folder / "training_args.bin").write_bytes(b"a pickle")
    return folder


@pytest.fixture(scope="module")
def folder(source):
    card = export.card(client="the desk", base="embedded", data=["posts"], manifests=[MANIFEST])
    out = source.with_name("model")
    export.export(source, out, prompt=PROMPT, window=256, max_new_tokens=24, card=card)
    return out


def test_the_weights_are_the_same_and_nothing_is_a_pickle(source, folder):
    assert require_merged(folder) == fingerprint(source)
    assert not list(folder.rglob("*.bin")) or {p.parent.name for p in folder.rglob("*.bin")} == {"openvino"}
    settings = export.read_settings(folder)
    assert settings == (PROMPT, [1], [], [2], "compact", 256, 24, fingerprint(folder))
    text = PROMPT.replace("{text}", "Ada Morn leads Brinvex Labs.")
    answers = [models.generate(*models.load(path), [text], max_new_tokens=24)[0].ids for path in (source, folder)]
    assert answers[0] == answers[1]


def test_generation_is_greedy_and_bounded(folder):
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["max_new_tokens"] == 24
    assert settings["do_sample"] is False
    assert settings["eos_token_id"] == 2


def test_the_four_bit_configuration_packs_the_model(folder):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**json.loads((folder / "nf4.json").read_text()))
    assert AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).is_loaded_in_4bit


def test_the_card_has_its_header_and_the_verdicts_as_they_are(folder):
    text = (folder / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "transformers"
    assert "synthetic" in header["tags"]
    assert "| 03_sft | F1 \\| all | 0.5123 | 0.4 to 0.6 | >= 0.8 | **missed** |" in text
    assert "| 03_sft | rows | 7 |  |  |  |" in text
    assert "Simulated" in text
    real = export.card(client="c", base="b", data=[], manifests=[MANIFEST | {"simulated": False}])
    assert "imulated" not in real


@pytest.mark.parametrize("library", ["transformers", "vllm", "openvino_genai"])
def test_the_commands_of_the_card_work(folder, library):
    pytest.importorskip(library)
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    (block,) = [block for block in blocks if re.search(rf"^(from|import) {library}\b", block, flags=re.MULTILINE)][:1]
    ended = subprocess.run([sys.executable, "-c", block], cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "Ada Morn" in ended.stdout  # an untuned base may take either text form, and finds the name in both


def test_what_cannot_be_served_is_refused_and_leaves_the_old_folder(source, folder, tmp_path):
    asked = {"prompt": PROMPT, "window": 256, "max_new_tokens": 24, "card": ""}
    before = fingerprint(folder)
    with pytest.raises(ValueError, match="not a merged checkpoint"):
        export.export(models.EMBEDDED, folder, **asked)
    with pytest.raises(ValueError, match="no place for the document"):
        export.export(source, folder, **asked | {"prompt": "Report:"})
    with pytest.raises(ValueError, match="exceed the context of"):
        export.export(source, folder, **asked | {"window": 10**6})
    assert fingerprint(folder) == before
    with pytest.raises(FileNotFoundError, match=r"no erlib\.json"):
        export.read_settings(tmp_path)


def test_a_published_model_is_found_by_its_link(folder, tmp_path):
    link = tmp_path / "model"
    export.publish(tmp_path / "old", link)
    export.publish(folder, link)
    assert export.read_settings(link) == export.read_settings(folder)
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="in the way"):
        export.publish(folder, tmp_path / "mine")


# -- erlib serve --------------------------------------------------------------------------------------------------


def test_serving_without_its_packages_says_how_to_install_them(folder):
    if importlib.util.find_spec("fastapi") and importlib.util.find_spec("uvicorn"):
        pytest.skip("they are installed")
    command = [sys.executable, "-m", "erlib", "serve", "--model", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "pip install -c constraints.txt -e '.[serve]'" in ended.stderr


@contextmanager
def served(folder, **environment):
    """The port of a server of the model in this folder, in a process of its own."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "erlib", "serve", "--model", str(folder), "--port", str(port)]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": os.environ | environment}
    with subprocess.Popen(command, **silent) as server:
        try:
            yield port
        finally:
            server.kill()


def test_a_loopback_request_is_answered_whole_and_in_a_stream(folder):
    text = PROMPT.replace("{text}", "Ada Morn leads Brinvex Labs.")
    body = {"model": str(folder), "prompt": text, "temperature": 0, "max_tokens": 24}
    expected = models.generate(*models.load(folder), [text], max_new_tokens=24)[0].text
    with served(folder) as port:
        assert json.loads(_post(port, body))["choices"][0]["text"] == expected
        lines = _post(port, body | {"stream": True}).decode().splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert len(chunks) > 3
    assert "".join(chunk["choices"][0]["text"] or "" for chunk in chunks) == expected


def test_models_and_chat_are_answered_on_a_machine_without_a_hub_cache(folder, tmp_path):
    nothing = str(tmp_path / "none")
    text = PROMPT.replace("{text}", "Ada Morn leads Brinvex Labs.")
    chat = {"model": str(folder), "messages": [{"role": "user", "content": "Ada Morn leads Brinvex Labs."}]}
    with served(folder, HF_HOME=nothing, HF_HUB_CACHE=nothing) as port:
        _post(port, {"model": str(folder), "prompt": text, "temperature": 0, "max_tokens": 2})
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=60) as answer:
            assert [model["id"] for model in json.loads(answer.read())["data"]] == [str(folder)]
        with pytest.raises(urllib.error.HTTPError) as caught:
            _post(port, chat, "chat/completions")
        assert caught.value.code == 400
        assert "/v1/completions" in json.loads(caught.value.read())["error"]["message"]


def test_a_port_in_use_is_told_before_the_model_is_loaded(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} cannot be used .*--port"):
            server.serve(folder, port)


def _post(port: int, body: dict, where: str = "completions") -> bytes:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/{where}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(120):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.read()
        except ConnectionRefusedError:
            time.sleep(0.5)
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.5)
    raise TimeoutError(Path(sys.executable))
