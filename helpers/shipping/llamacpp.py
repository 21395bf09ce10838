"""A GGUF file answering on the processor: llama.cpp's server in a process of its own, asked over the loopback address.

In a process of its own because it takes Ctrl-C for itself, and because what ends it shouldn't end a notebook. It listens on this
machine alone and answers nobody without the key that is made for it.
"""

import contextlib
import json
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from helpers.files import CourseError
from helpers.runtime import ROOT, progress_bar

SECONDS = 300  # for one answer
CONTEXT = 2048  # tokens of prompt and answer together


class LlamaCpp(contextlib.AbstractContextManager):
    """llama.cpp with one GGUF file, and a LoRA's on it if `lora` names one. A context manager; `threads` None: as many as torch takes.

    `tools`: the folder that `gguf_files.tools()` gives. `rows`: how many answers at once; with one, answers don't depend on each other.
    """

    def __init__(self, tools: Path, path: Path, lora: Path | None = None, threads: int | None = None, rows: int = 1):
        for file in filter(None, (path, lora)):
            if not Path(file).is_file():
                raise CourseError(f"There is no {Path(file).name}: gguf_files.convert writes a model's, gguf_files.convert_adapter an adapter's.")
        if threads is None:
            import torch

            threads = torch.get_num_threads()
        self.name, self.rows, self.key = Path(path).name, rows, secrets.token_urlsafe(24)
        command = [sys.executable, "-m", "helpers.shipping.llamacpp", "--serve"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, cwd=ROOT, **pipes, text=True, encoding="utf-8", start_new_session=True)  # out of Ctrl-C's reach
        settings = {"tools": str(tools), "model": str(Path(path).resolve()), "lora": str(Path(lora).resolve()) if lora else None}
        try:
            self.process.stdin.write(json.dumps(settings | {"threads": threads, "rows": rows, "key": self.key}) + "\n")
            self.process.stdin.flush()
            said = self.process.stdout.readline()  # "" where it ended, as llama.cpp does on some damaged files
        except BaseException:
            self.close()
            raise
        if not said.startswith("http://127.0.0.1:"):
            self.close()
            raise CourseError(f"llama.cpp could not load {self.name}{f' with {Path(lora).name}' if lora else ''}: {said.strip() or 'it ended'}. Convert it again.")
        self.address = said.strip()
        self.reach = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # a proxy has no business here

    def _ask(self, path: str, body: dict) -> dict:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        try:
            with self.reach(urllib.request.Request(self.address + path, json.dumps(body).encode(), headers), timeout=SECONDS) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                raise CourseError(f"llama.cpp refused ({self.name}): {json.loads(error.read())['error']['message'][:200]}") from None
            raise CourseError(f"llama.cpp refused ({self.name}): HTTP {error.code}.") from None
        except OSError as error:
            raise CourseError(f"llama.cpp with {self.name} no longer answers ({type(error).__name__}): start it again.") from None

    def rendered(self, conversation: list[dict]) -> str:
        """A conversation as the prompt that llama.cpp makes of it, by the chat template in the file."""
        return self._ask("/apply-template", {"messages": conversation})["prompt"]

    def tokens(self, prompt: str) -> list[int]:
        """A prompt's token ids, as llama.cpp's chat reads it: control tokens such as <|im_end|> are read as such wherever they stand."""
        return self._ask("/tokenize", {"content": prompt, "add_special": True, "parse_special": True})["tokens"]

    def answers(self, conversations, max_new_tokens: int = 96, progress: str = "") -> tuple[list[str], float]:
        """Greedy answers to a list of chats, in the order asked, and the seconds they took."""

        def one(conversation) -> str:
            body = {"messages": conversation, "temperature": 0, "max_tokens": max_new_tokens, "cache_prompt": False}
            answer = self._ask("/v1/chat/completions", body)["choices"][0]["message"]["content"]
            bar.update(1)
            return answer.strip()

        start = time.perf_counter()
        with progress_bar(len(conversations), progress) as bar, ThreadPoolExecutor(self.rows) as pool:
            return list(pool.map(one, conversations)), time.perf_counter() - start

    def close(self) -> None:
        """Ends the process; its memory is free then."""
        self.process.kill()
        self.process.communicate()

    def __exit__(self, *_) -> None:
        self.close()


def compare_tokens(tokenizer, llama: LlamaCpp, conversations) -> list[dict]:
    """For each conversation: what transformers' template and tokenizer make of it, what llama.cpp's do, and whether that is the same.

    {"prompt": bool, "tokens": bool, "ids": transformers', "theirs": llama.cpp's}. A prompt may be the same text and other tokens.
    """
    found = []
    for conversation in conversations:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"]
        theirs = llama.rendered(conversation)
        their_ids = llama.tokens(theirs)
        found.append({"prompt": text == theirs, "tokens": ids == their_ids, "ids": ids, "theirs": their_ids})
    return found


def tokens_per_second(tokenizer, answers: list[str], seconds: float) -> float:
    """Tokens written per second, prompts' reading included; each answer's end counts as one."""
    return sum(len(tokenizer(answer)["input_ids"]) + 1 for answer in answers) / seconds


# ---------------------------------------------------------------- the server's own side


def _serve() -> None:
    """Reads its settings from the first line, loads, says its address (or what went wrong), and ends when its parent does."""
    import importlib
    import os

    settings = json.loads(sys.stdin.readline())
    sys.path.append(settings["tools"])  # last: what the course has of its own comes first
    try:
        library = importlib.import_module("xllamacpp")  # in an environment of its own: gguf_files.tools
        params = library.CommonParams()
        params.model.path, params.api_keys, params.hostnames, params.port = settings["model"], [settings["key"]], ["127.0.0.1"], 0
        params.n_ctx, params.n_parallel, params.cache_ram_mib = CONTEXT * settings["rows"], settings["rows"], 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
        params.ui, params.endpoint_slots, params.force_pure_content_parser, params.offline = False, False, True, True
        if settings["lora"]:
            params.lora_adapters = [library.CommonAdapterLoraInfo(settings["lora"], 1.0)]
        server = library.Server(params)
        print(server.listening_address, flush=True)
        sys.stdin.read()
    except Exception as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0][:200], flush=True)
    os._exit(0)  # no wait for llama.cpp's threads


if __name__ == "__main__" and "--serve" in sys.argv:
    _serve()
