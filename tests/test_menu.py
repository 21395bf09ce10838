"""The menu: sizes from shapes, every refusal one sentence, downloads with a stand-in for the Hub; and the held-out text."""

import hashlib
import os
import re
import sys
import time
import types

import pytest
from huggingface_hub import errors

from helpers import hub, menu, models, recipes, times
from helpers.files import CourseError
from helpers.runtime import DATA, ROOT, Device, decide

PUBLISHED = {  # parameters, from the models' cards and safetensors headers
    "SmolLM2-135M-Instruct": 134_515_008,
    "SmolLM2-360M-Instruct": 361_821_120,
    "SmolLM2-1.7B-Instruct": 1_711_376_384,
    "Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "gemma-2b-it": 2_506_172_416,
    "gemma-7b-it": 8_537_680_896,
    "Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "Llama-3-8B-Instruct": 8_030_261_248,
}
MISTRAL, LLAMA, SMALL = (menu.MENU[name] for name in ("Mistral-7B-Instruct-v0.3", "Llama-3-8B-Instruct", "SmolLM2-360M-Instruct"))


# ---------------------------------------------------------------- the entries


@pytest.mark.parametrize("name", menu.MENU)
def test_a_shape_gives_the_published_parameters(name):
    import torch
    from transformers import AutoModelForCausalLM

    entry = menu.MENU[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(entry.config())
    assert entry.parameters == PUBLISHED[name] == sum(p.numel() for p in model.parameters())
    assert entry.download_bytes == 2 * PUBLISHED[name]


def test_every_entry_is_pinned_and_has_its_terms():
    assert menu.MENU.keys() == PUBLISHED.keys()
    assert all(re.fullmatch("[0-9a-f]{40}", entry.revision) for entry in menu.MENU.values())
    assert len({entry.revision for entry in menu.MENU.values()}) == len(menu.MENU)
    gated = {entry.name: entry.licence for entry in menu.MENU.values() if entry.gated}
    assert gated == {"gemma-2b-it": "Gemma terms", "gemma-7b-it": "Gemma terms", "Llama-3-8B-Instruct": "Llama 3 community licence"}
    assert {entry.licence for entry in menu.MENU.values() if not entry.gated} == {"Apache-2.0"}
    assert menu._entry("a/b", "unpinned", *"llama 8 8 1 1 1 8 8 tied".split()).revision is None


def test_choose(monkeypatch):
    monkeypatch.delenv("COURSE_MODEL", raising=False)
    assert menu.choose().name == "SmolLM2-135M-Instruct"
    monkeypatch.setenv("COURSE_MODEL", "gemma-7b-it")
    assert menu.choose().repo == "google/gemma-7b-it" and menu.choose("Llama-3-8B-Instruct") is LLAMA
    with pytest.raises(
        CourseError, match=r"^Unknown model 'gpt-9': the menu has SmolLM2-135M-Instruct, .*Set COURSE_MODEL to one of them, or unset it\.$"
    ):
        menu.choose("gpt-9")


# ---------------------------------------------------------------- what the machine can hold


@pytest.mark.parametrize(
    ("bits", "says"), [(16, r"Mistral-7B-Instruct-v0.3 at 16 bits needs about 29.2 GB .* and 16.0 GB are there: use fewer bits"), (5, "bits must be")]
)
def test_load_model_refuses_before_it_downloads(monkeypatch, bits, says):
    import torch

    monkeypatch.setattr(models, "device", lambda: Device("cpu", "", torch.float32, "", 16.0))
    monkeypatch.setattr(models, "fetch", lambda entry: pytest.fail("downloaded"))
    with pytest.raises(CourseError, match=says):
        models.load_model(bits, name=MISTRAL.name)


# ---------------------------------------------------------------- the Hub, and a stand-in for it


class Hub:
    """In place of huggingface_hub: what the module asks of it, answered from a folder or by raising `fails`."""

    def __init__(self, tmp_path, fails=None, fails_midway=None):
        self.fails, self.fails_midway, self.asked, self.source = fails, fails_midway, [], tmp_path / "source"
        self.tries, self.slept = 0, []

    def get_token(self):
        return os.environ.get("HF_TOKEN")  # as the real one: before what is stored

    def try_to_load_from_cache(self, repo, file, revision):
        path = self.source.parent / "hub" / file
        return str(path) if path.exists() else None

    def hf_hub_url(self, repo, file, revision):
        return f"{repo}/{revision}/{file}"

    def get_hf_file_metadata(self, url, token, timeout):
        self.asked.append(url)
        self.tries += 1
        if self.fails:
            raise self.fails.pop(0) if isinstance(self.fails, list) else self.fails

    def hf_hub_download(self, repo, file, revision, token):
        if self.fails_midway:
            raise self.fails_midway
        self.asked.append((repo, file, revision, token))
        return str(self.source / file)

    def snapshot_download(self, repo, revision, token, allow_patterns):
        if self.fails_midway:
            raise self.fails_midway
        self.asked.append((repo, revision, token, allow_patterns))
        return str(self.source)


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    def make(**how):
        there = Hub(tmp_path, **how)
        monkeypatch.setattr(hub, "huggingface_hub", there)
        monkeypatch.setattr(hub, "sleep", there.slept.append)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        return there

    return make


def machine(monkeypatch, here, flops=1e12):
    """Another machine's facts and matmul rate, wherever the course asks for them."""
    for module in (hub, models, recipes):
        monkeypatch.setattr(module, "device", lambda: here)
    monkeypatch.setattr(times, "rates", lambda: times.Rates(here.kind, here.dtype_name, flops, flops, flops))


T4 = decide("cuda", "Tesla T4", 15.8, (7, 5))


def refused(kind, status=403, **headers):
    """An error of the Hub's, with a secret in its text that must not be repeated."""
    error = kind.__new__(kind)  # the constructors differ between versions and want a whole response
    Exception.__init__(error, f"{kind.__name__}: hf_secret")
    error.response = types.SimpleNamespace(status_code=status, headers={name.replace("_", "-"): value for name, value in headers.items()})
    return error


class ConnectError(Exception):
    """As httpx raises it: no OSError."""


HUB_FAILURES = [
    (refused(errors.GatedRepoError), r"The Hub refuses Llama-3-8B-Instruct: accept the Llama 3 community licence at https://\S+ with the account of"),
    (refused(errors.RevisionNotFoundError, 404), r"The Hub no longer has meta-llama/Meta-Llama-3-8B-Instruct at 8afb486c\w+: choose another model"),
    (refused(errors.RepositoryNotFoundError, 404), r"The Hub shows no meta-llama/Meta-Llama-3-8B-Instruct to your token: check HF_TOKEN"),
    (refused(errors.HfHubHTTPError, 503), r"The Hub answered HTTP 503 for Llama-3-8B-Instruct: check HF_TOKEN if that is 401, else wait a minute"),
    (errors.OfflineModeIsEnabled("offline"), r"Could not fetch Llama-3-8B-Instruct from the Hub \(OfflineModeIsEnabled\): is there a network\?"),
    (errors.LocalEntryNotFoundError("no"), r"Could not fetch .*\(LocalEntryNotFoundError\): is there a network\? .*SmolLM2-135M-Instruct needs none"),
    (ConnectError("no host"), r"Could not fetch .*\(ConnectError\): is there a network\? Run again"),
    (OSError(28, "No space left on device"), r"The disk filled up while downloading Llama-3-8B-Instruct: free some and run again"),
    (OSError("something of transformers"), r"Could not fetch .*\(OSError\)"),
]


@pytest.mark.parametrize("when", ["fails", "fails_midway"])
@pytest.mark.parametrize(("error", "says"), HUB_FAILURES, ids=lambda value: type(value).__name__)
def test_what_the_hub_refuses_is_one_sentence(stand_in, monkeypatch, when, error, says):
    stand_in(**{when: error})
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(CourseError, match=f"^{says}") as refusal:
        hub.fetch(LLAMA)
    assert "hf_secret" not in str(refusal.value) and refusal.value.__cause__ is None


def test_a_gated_model_without_a_token_asks_nothing_of_the_hub(stand_in):
    there = stand_in()
    with pytest.raises(
        CourseError, match="^Llama-3-8B-Instruct is gated: accept the Llama 3 community licence at https://.*then set HF_TOKEN to a read token"
    ):
        hub.fetch(LLAMA)
    assert there.asked == []


@pytest.mark.parametrize("when", ["fails", "fails_midway"])
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_four_times(stand_in, capsys, when, status):
    there = stand_in(**{when: refused(errors.HfHubHTTPError, status)})
    with pytest.raises(CourseError, match=f"^The Hub answered HTTP {status} for Mistral-7B-Instruct-v0.3: .* wait a minute and run again"):
        hub.fetch(MISTRAL)
    assert there.slept == [5, 15, 45] and there.tries == 4
    lines = [f"The Hub is busy (HTTP {status}): trying again in {seconds} s." for seconds in (5, 15, 45)]
    assert [line for line in capsys.readouterr().out.splitlines() if not line.startswith("Downloading")] == lines


def test_a_busy_hub_that_recovers_and_says_when(stand_in, capsys):
    busy = [refused(errors.HfHubHTTPError, 429, Retry_After=after) for after in ("7", "600", "Wed, 21 Oct 2026 07:28:00 GMT")]
    there = stand_in(fails=busy)
    assert hub.fetch(MISTRAL) == there.source and there.slept == [7, 60, 45]
    masked = errors.LocalEntryNotFoundError("as snapshot_download says it")
    masked.__cause__ = refused(errors.HfHubHTTPError, 503)
    there = stand_in(fails=[masked])
    assert hub.fetch(MISTRAL) == there.source and there.slept == [5]


@pytest.mark.parametrize("error", [refused(errors.HfHubHTTPError, 404), refused(errors.GatedRepoError), ConnectError("no host")], ids=str)
def test_what_will_not_pass_is_asked_once(stand_in, error):
    there = stand_in(fails=error)
    with pytest.raises(CourseError):
        hub.fetch(MISTRAL)
    assert there.slept == [] and there.tries == 1


# ---------------------------------------------------------------- the token


class SecretNotFoundError(Exception):
    """Colab's have these names; it says the secret's name, here the secret itself, which must not be repeated."""


class NotebookAccessError(Exception):
    pass


class TimeoutException(Exception):
    pass


@pytest.fixture
def colab(monkeypatch):
    """A stand-in for google.colab: its userdata answers with a text or raises."""

    def put(answer):
        def get(name):
            assert name == "HF_TOKEN"
            if isinstance(answer, Exception):
                raise answer
            return answer

        package = types.ModuleType("google.colab")
        package.userdata = types.SimpleNamespace(get=get)
        monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
        monkeypatch.setitem(sys.modules, "google.colab", package)

    return put


def test_the_tokens_order(stand_in, monkeypatch, colab, capsys):
    there = stand_in()
    assert hub.token() is None
    there.get_token = lambda: "hf_stored"
    assert hub.token() == "hf_stored"
    there.get_token = lambda: pytest.fail("it would ask Colab for the secret again")
    colab(" hf_secret\n")
    assert hub.token() == "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "hf_environment ")
    colab(AssertionError("asked although the environment has one"))
    assert hub.token() == "hf_environment"
    monkeypatch.setenv("HF_TOKEN", " ")
    colab("")
    assert hub.token() is None and capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", [SecretNotFoundError, NotebookAccessError, TimeoutException, AttributeError])
def test_colab_that_gives_no_secret_is_one_sentence(stand_in, colab, capsys, kind):
    there = stand_in()
    there.get_token = lambda: pytest.fail("it would ask Colab for the secret again")
    colab(kind("hf_secret"))
    assert hub.token() is None
    shown = capsys.readouterr().out
    assert shown == f"No token ({kind.__name__}): to use one, grant this notebook access to the secret HF_TOKEN (key symbol on the left).\n"
    assert hub.fetch(MISTRAL) == there.source and there.asked[-1][2] is False  # False: huggingface_hub looks for no other
    with pytest.raises(CourseError, match="^Llama-3-8B-Instruct is gated"):
        hub.fetch(LLAMA)


def test_the_real_librarys_order_off_colab(monkeypatch, tmp_path):
    from huggingface_hub import constants

    (tmp_path / "token").write_text("hf_stored\n", encoding="utf-8")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "tokens"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert hub.token() == "hf_stored"
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    assert hub.token() == "hf_environment"


# ---------------------------------------------------------------- what is said before a download


def test_an_estimate_in_full(monkeypatch):
    """Mistral-7B on a T4, then on a small CPU: the literal sentence."""
    machine(monkeypatch, T4, flops=20e12)
    shown = (
        "Estimates for this machine's 15.8 GB: 14.6 GB (fits) at 16 bits, 4.7 GB (fits) at 4; "
        "6.1 GB (fits) to train at 4 bits with gradient checkpointing, about 28 minutes for 440 steps."
    )
    assert hub.estimate(MISTRAL) == shown  # 6 * 7.248e9 * 440 * 8 * 67 / (0.3 * 20e12) = 1709 s
    machine(monkeypatch, decide("cpu", "", 4.0, speedup=1.0), flops=1e11)
    shown = (
        "Estimates for this machine's 4.0 GB: 29.2 GB (does not fit) at 16 bits, 5.5 GB (does not fit) at 4; "
        "7.8 GB (does not fit) to train at 4 bits with gradient checkpointing, about 2,339 minutes for 440 steps."
    )
    assert hub.estimate(MISTRAL) == shown
    machine(monkeypatch, decide("cpu", "", 16.0, speedup=3.0), flops=1.46e12)
    assert hub.estimate(SMALL).endswith("(fits) to train at 4 bits, about 7 minutes for 440 steps.")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_for_the_course_model_it_is_the_time_of_its_own_run(dtype):
    """Counted by parameters alone, the head's at every token too: a little more than by what a step computes."""
    from helpers import budget

    at = times.Rates("cpu", dtype, 1e11, 1e11, 1e11)
    tokens, rate = times.training_pace(at)
    seconds = budget.training_seconds(PUBLISHED["SmolLM2-135M-Instruct"], 440 * 8 * tokens, rate)
    assert seconds == pytest.approx(times.seconds(times.sft(recipes.SFTRecipe()), at), rel=0.1)


def test_the_mean_tokens_of_a_training_example(tokenizer):
    """In batches of 8 of like length, padded to a multiple of 8."""
    from helpers import flights

    examples = [flights.prompt_completion(row) for row in flights.load_questions("train")]
    chats = tokenizer.apply_chat_template([row["prompt"] + row["completion"] for row in examples], return_dict=True)["input_ids"]
    lengths = sorted(map(len, chats))
    padded = [8 * -(-max(lengths[i : i + 8]) // 8) for i in range(0, len(lengths), 8)]
    assert sum(padded) / len(padded) == pytest.approx(times.PADDED_TOKENS, abs=1)


def test_a_download_says_what_it_is_first_and_a_whole_cache_says_nothing(stand_in, capsys, monkeypatch):
    machine(monkeypatch, T4, flops=20e12)
    there = stand_in()
    there.get_token = lambda: "hf_stored"
    assert models.model_path.__wrapped__(MISTRAL.name) == there.source
    shown = f"Downloading Mistral-7B-Instruct-v0.3 (Apache-2.0), 14.5 GB, once. {hub.estimate(MISTRAL)}\n"
    assert capsys.readouterr().out == shown
    repo, revision, token, patterns = there.asked[-1]
    assert (repo, revision, token) == (MISTRAL.repo, MISTRAL.revision, "hf_stored")
    import fnmatch

    wanted = {"config.json", "model-00001-of-00003.safetensors", "tokenizer.json", "model.safetensors.index.json", "chat_template.jinja"}
    listed = wanted | {"consolidated.safetensors", "pytorch_model.bin", "gemma-7b-it.gguf", "modeling_x.py", "original/consolidated.00.pth"}
    assert {file for file in listed if any(fnmatch.fnmatch(file, pattern) for pattern in patterns)} == wanted

    cache = there.source.parent / "hub"
    cache.mkdir()
    for file in ("config.json", "tokenizer.json", "a.safetensors"):
        (cache / file).touch()
    (cache / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}', encoding="utf-8")
    there.fails = ConnectError("no host")
    with pytest.raises(CourseError, match="Could not fetch"):  # one shard is missing still
        hub.fetch(MISTRAL)
    (cache / "b.safetensors").touch()
    assert hub.fetch(MISTRAL) == cache and capsys.readouterr().out == ""  # offline, ungated or not
    assert hub.fetch(LLAMA) == cache


def test_a_model_of_the_menu_loads_from_the_hubs_folder(stand_in, monkeypatch, tmp_path):
    """A tiny model in the Hub's cache, without a pad token as Llama 3's, through load_model and load_tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    there, cache = stand_in(), tmp_path / "hub"
    tiny = menu._entry("x/tiny", "unpinned", *"llama 64 64 1 2 1 32 49152 tied".split())
    monkeypatch.setitem(menu.MENU, "tiny", tiny)
    monkeypatch.setattr(models, "device", lambda: Device("cpu", "", torch.float32, "", 8.0))
    config = tiny.config()
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, [2, 3], None
    AutoModelForCausalLM.from_config(config).save_pretrained(cache)
    tokenizer = models.load_tokenizer(models.COURSE_MODEL)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(cache)
    model = models.load_model(name="tiny")
    assert model.num_parameters() == tiny.parameters and model.generation_config.pad_token_id == 2 and not model.training
    loaded = models.load_tokenizer("tiny")
    assert loaded.pad_token == loaded.eos_token and loaded.padding_side == "left" and there.asked == []


def tiny_of(kind, monkeypatch, cache, poison=False):
    """A tiny model of a family, by the name "tiny" in the menu, with a matrix of inf if poisoned."""
    import torch
    from transformers import AutoModelForCausalLM

    tiny = menu._entry("x/tiny", "unpinned", *f"{kind} 64 64 1 2 1 32 64 tied".split())
    monkeypatch.setitem(menu.MENU, "tiny", tiny)
    model = AutoModelForCausalLM.from_config(tiny.config())
    if poison:
        torch.nn.init.constant_(model.model.layers[0].mlp.down_proj.weight, float("inf"))
    model.save_pretrained(cache)
    monkeypatch.setattr(models, "model_path", lambda name: print("loading") or cache)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_larger_model_that_overflows_float16_is_refused(monkeypatch, tmp_path, dtype):
    import torch

    tiny_of("llama", monkeypatch, tmp_path)
    assert not models.load_model(name="tiny", dtype=getattr(torch, dtype)).training
    tiny_of("llama", monkeypatch, tmp_path, poison=True)
    if dtype == "float32":  # not asked
        assert not models.load_model(name="tiny", dtype=torch.float32).training
        return
    with pytest.raises(CourseError, match="^tiny overflows float16, the precision here: take a GPU with bfloat16, or another model"):
        models.load_model(name="tiny", dtype=torch.float16)


@pytest.mark.parametrize(("kind", "dtype", "told"), [("gemma", "float16", True), ("gemma", "bfloat16", False), ("llama", "float16", False)])
def test_gemma_in_float16_is_told_before_it_loads(monkeypatch, tmp_path, capsys, kind, dtype, told):
    import torch

    tiny_of(kind, monkeypatch, tmp_path)
    models.load_model(name="tiny", dtype=getattr(torch, dtype))
    sentence = "Gemma's activations can overflow float16, in which this device computes: take a GPU with bfloat16, or another model (COURSE_MODEL)."
    assert capsys.readouterr().out.splitlines() == [sentence] * told + ["loading"]


# ---------------------------------------------------------------- the original weights


def test_original_weight_comes_from_the_pinned_revision(stand_in):
    import torch
    from safetensors.torch import save_file

    there = stand_in()
    there.source.mkdir()
    name = "model.layers.15.mlp.down_proj.weight"
    save_file({name: torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)}, there.source / "model.safetensors")
    weight = models.original_weight()
    assert weight.dtype == torch.bfloat16 and weight.tolist() == [[0, 1, 2], [3, 4, 5]]
    repo = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert there.asked[-1] == (repo, "model.safetensors", "12fd25f77366fa6b3b4b768ec3050bf629380bac", False)
    with pytest.raises(CourseError, match="The model has no tensor 'nope': take a name from"):
        models.original_weight("nope")


@pytest.mark.parametrize("when", ["fails", "fails_midway"])
@pytest.mark.parametrize("error", [error for error, _ in HUB_FAILURES], ids=lambda error: type(error).__name__)
def test_original_weight_is_none_without_a_network(stand_in, when, error):
    stand_in(**{when: error})
    assert models.original_weight() is None


def test_a_silent_network_is_given_up(stand_in, monkeypatch):
    there = stand_in()
    there.get_hf_file_metadata = lambda *a, **k: time.sleep(2)
    start = time.perf_counter()
    with pytest.raises(TimeoutError):
        hub._reach(SMALL, "config.json", None, seconds=0.1)
    assert time.perf_counter() - start < 1


def test_the_real_hub_library_offline(monkeypatch, tmp_path):
    """Nothing stands in: a host that can't be found, then HF_HUB_OFFLINE; no traceback, and not for long."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "https://hub.invalid/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        start = time.perf_counter()
        assert models.original_weight() is None
        with pytest.raises(CourseError, match="Could not fetch Llama-3-8B-Instruct from the Hub .*: is there a network?"):
            hub.fetch(LLAMA)
        assert time.perf_counter() - start < 20


@pytest.fixture
def local_hub(tmp_path):
    """A server on this machine that answers as the Hub does: one public file, and refusals for everything else."""
    import http.server
    import threading

    (tmp_path / "served").mkdir()

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            _, owner, name, _, revision, file = self.path.split("/", 5)
            path = tmp_path / "served" / file
            good = f"{owner}/{name}" == menu.MENU[models.COURSE_MODEL].repo and path.exists()
            refusal = {"google": (403, "GatedRepo"), "Qwen": (404, "RevisionNotFound"), "mistralai": (404, "RepoNotFound"), "meta-llama": (503, None)}
            status, code = (200, None) if good else refusal.get(owner, (400, None))
            body = path.read_bytes() if good else b""
            self.send_response(status)
            headers = {"X-Repo-Commit": revision, "ETag": '"e1"', "Content-Length": len(body), "X-Error-Code": code}
            for header, value in (headers | {"Retry-After": 7 if status == 503 else None}).items():
                if value is not None:
                    self.send_header(header, str(value))
            self.end_headers()
            return body

        def do_GET(self):
            self.wfile.write(self.do_HEAD())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", tmp_path / "served"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_the_real_hub_library_against_a_local_server(local_hub, tmp_path):
    import json
    import os
    import subprocess
    import sys

    import torch
    from safetensors.torch import save_file

    endpoint, served = local_hub
    save_file({"w": torch.ones(2, 3, dtype=torch.bfloat16)}, served / "model.safetensors")
    code = """
import json, sys
from helpers import hub, menu, models
hub.sleep = lambda seconds: None
says = [models.original_weight("w").tolist(), models.original_weight("w").tolist()]
for name in sys.argv[1:]:
    try:
        hub.fetch(menu.MENU[name])
    except models.CourseError as error:
        says.append(str(error))
print(json.dumps(says))
"""
    names = ["gemma-7b-it", "Qwen2.5-1.5B-Instruct", "Mistral-7B-Instruct-v0.3", "SmolLM2-360M-Instruct", "Llama-3-8B-Instruct"]
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret", "no_proxy": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, env=environment, cwd=ROOT)
    *busy, last = done.stdout.splitlines()
    assert busy == ["The Hub is busy (HTTP 503): trying again in 7 s."] * 3
    first, again, *refusals = json.loads(last)
    assert first == again == [[1.0] * 3] * 2
    starts = [
        "The Hub refuses gemma-7b-it",
        "The Hub no longer has Qwen/",
        "The Hub shows no mistralai/",
        "The Hub answered HTTP 400 for SmolLM2-360M",
        "The Hub answered HTTP 503 for Llama-3-8B",
    ]
    assert len(refusals) == 5 and all(map(str.startswith, refusals, starts)), refusals
    assert "hf_secret" not in done.stdout + done.stderr


# ---------------------------------------------------------------- the held-out text


def test_the_datasheet_describes_the_held_out_text():
    text = (DATA / "held_out" / "text.txt").read_bytes()
    row = next(line for line in (DATA / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| held_out/text.txt"))
    _, _, words, paragraphs, digest, _ = (cell.strip(" `") for cell in row.split("|"))
    assert digest == hashlib.sha256(text).hexdigest()
    assert int(words.replace(",", "")) == len(text.split())
    assert int(paragraphs) == len(text.decode("ascii").strip().split("\n\n"))
