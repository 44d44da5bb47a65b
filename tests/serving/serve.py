"""`vllm serve` from the shell, on the CPU: `serve.py MODEL FOLDER`.

FOLDER gets a copy of MODEL with a tokenizer of one token for each word, and the logs. The commands
are those of docs/serving.md, with options for a CPU. The script compares the completions of one
request to each server, and checks that weightlift loaded if it was selected.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WAYS: dict[str, list[str]] = {
    "auto": ["--load-format", "auto"],
    "slices": ["--load-format", "weightlift"],
    "whole": ["--load-format", "weightlift", "--model-loader-extra-config", '{"slices": false}'],
}
SAID = {"slices": "the slices of this rank are", "whole": "in whole tensors"}
# Importing the extension makes vLLM's worker run with a torch without an accelerator.
FOR_A_CPU = {
    "--dtype": "bfloat16",
    "--max-model-len": "64",
    "--max-num-seqs": "2",
    "--worker-extension-cls": "worker_extension.WorkerExtension",
}
REQUEST = {"prompt": "w5 w9 w77 w3", "max_tokens": 16, "temperature": 0, "return_token_ids": True}
START_SECONDS = 600


def served_copy(model: Path, folder: Path) -> Path:
    copy = folder / "served"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(model, copy)
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(copy)
    return copy


def answer(port: int, path: str, body: dict[str, Any] | None = None) -> bytes:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        found: bytes = response.read()
    return found


def is_ready(port: int) -> bool:
    try:
        answer(port, "/health")
    except (urllib.error.URLError, ConnectionError):
        return False
    return True


def wait_until_ready(port: int, server: subprocess.Popen[bytes]) -> None:
    begun = time.monotonic()
    while not is_ready(port):
        if server.poll() is not None or time.monotonic() - begun > START_SECONDS:
            sys.exit(f"the server has not started (exit code {server.poll()})")
        time.sleep(1)


def completion(way: str, model: Path, log: Path) -> dict[str, Any]:
    """The completion of a server that is started for it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    vllm = str(Path(sys.executable).with_name("vllm"))
    command = [vllm, "serve", str(model), *WAYS[way], "--enforce-eager", "--port", str(port)]
    command += [part for option in FOR_A_CPU.items() for part in option]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(__file__).parent),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    print("$", *command[1:], flush=True)
    with log.open("wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        wait_until_ready(port, server)
        text = answer(port, "/v1/completions", {**REQUEST, "model": str(model)})
    finally:
        server.terminate()
        server.wait(60)
    choice = json.loads(text)["choices"][0]
    return {key: choice[key] for key in ("text", "token_ids", "finish_reason")}


def main() -> None:
    model, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    copy = served_copy(model, folder)
    faults = []
    wanted: dict[str, Any] = {}
    for way in WAYS:
        log = folder / f"{way}.log"
        found = completion(way, copy, log)
        print(f"served {way}: {json.dumps(found)}", flush=True)
        wanted = wanted or found
        if found != wanted or not found["text"]:
            faults.append(f"{way}: another completion than by auto")
        if SAID.get(way, "") not in log.read_text():
            faults.append(f"{way}: the log does not say {SAID[way]!r}")
    print("\n".join(faults) or "served: all equal", flush=True)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
