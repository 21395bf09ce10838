"""The menu of models: licence, pinned revision, shape and sizes of each; fetched from the Hub, with one-sentence failures."""

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from helpers import budget
from helpers.runtime import CourseError

COURSE_MODEL = "SmolLM2-135M-Instruct"
FILES = ["*.json", "*.jinja", "model*.safetensors"]  # no pickles, no code, and not Mistral's second copy of its weights
TERMS = {"google": "Gemma terms", "meta-llama": "Llama 3 community licence"}  # gated: accepted on the Hub first

# hidden and intermediate size, layers, heads, key/value heads, a head's width, vocabulary: values of each published config.json.
# Commits and shapes as several public repositories quote them; Gemma 7B's shape is also GemmaConfig's default in transformers.
TABLE = """
HuggingFaceTB/SmolLM2-135M-Instruct  12fd25f77366fa6b3b4b768ec3050bf629380bac llama    576  1536 30  9  3  64  49152 tied
HuggingFaceTB/SmolLM2-360M-Instruct  a10cc1512eabd3dde888204e902eca88bddb4951 llama    960  2560 32 15  5  64  49152 tied
HuggingFaceTB/SmolLM2-1.7B-Instruct  31b70e2e869a7173562077fd711b654946d38674 llama   2048  8192 24 32 32  64  49152 tied
Qwen/Qwen2.5-1.5B-Instruct           989aa7980e4cf806f80c7fef2b1adb7bc71aa306 qwen2   1536  8960 28 12  2 128 151936 tied
google/gemma-2b-it                   96988410cbdaeb8d5093d1ebdc5a8fb563e02bad gemma   2048 16384 18  8  1 256 256000 tied
google/gemma-7b-it                   9c5798d27f588501ce1e108079d2a19e4c3a2353 gemma   3072 24576 28 16 16 256 256000 tied
mistralai/Mistral-7B-Instruct-v0.3   c170c708c41dac9275d15a8fff4eca08d52bab71 mistral 4096 14336 32 32  8 128  32768 untied
meta-llama/Meta-Llama-3-8B-Instruct  8afb486c1db24fe5011ec46dfbe5b5dccdb575c2 llama   4096 14336 32 32  8 128 128256 untied
"""
SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size".split()


@dataclass(frozen=True)
class Entry:
    """One model: `shape` holds the values of its published config.json, and every size is computed from them."""

    name: str
    repo: str  # on the Hugging Face Hub
    revision: str | None  # the commit; None: unpinned, the newest is taken
    licence: str
    gated: bool
    shape: dict = field(hash=False)

    def config(self):
        """The transformers config of this shape, without a network: for counting on the meta device."""
        from transformers import AutoConfig

        return AutoConfig.for_model(**self.shape)

    @property
    def parameters(self) -> int:
        return budget.total(budget.parameters(self.config()))

    @property
    def download_bytes(self) -> int:
        """An estimate: 2 bytes a parameter, as bfloat16 safetensors have; the tokenizer adds a few MB."""
        return 2 * self.parameters

    def memory(self, bits: int, itemsize: int = 2) -> dict[str, int]:
        """Named bytes that loading and answering take (an estimate); unquantized weights have `itemsize` bytes."""
        return budget.inference(self.config(), 8 * itemsize if bits == 16 else bits, dtype_bytes=itemsize)


def _entry(repo: str, revision: str, kind: str, *sizes: str) -> Entry:
    organisation, name = repo.split("/")
    shape = {"model_type": kind, **dict(zip(SIZES, map(int, sizes[:-1]), strict=True)), "tie_word_embeddings": sizes[-1] == "tied"}
    licence = TERMS.get(organisation, "Apache-2.0")
    return Entry(name.removeprefix("Meta-"), repo, None if revision == "unpinned" else revision, licence, organisation in TERMS, shape)


MENU = {entry.name: entry for entry in (_entry(*line.split()) for line in TABLE.strip().splitlines())}


def choose(name: str | None = None) -> Entry:
    """The model of that name, else the one that COURSE_MODEL names, else the course model."""
    name = name or os.environ.get("COURSE_MODEL") or COURSE_MODEL
    if name not in MENU:
        raise CourseError(f"Unknown model {name!r}: the menu has {', '.join(MENU)}. Set COURSE_MODEL to one of them, or unset it.")
    return MENU[name]


def _hub():
    import huggingface_hub

    return huggingface_hub


def _reach(entry: Entry, file: str, token, seconds: float = 8) -> None:
    """Asks the Hub for one file's header; raises what went wrong, after `seconds` at most.

    In a thread, because looking up a host has no time limit of its own; a download's own retries take 23 s without a network.
    """
    url = _hub().hf_hub_url(entry.repo, file, revision=entry.revision)
    ThreadPoolExecutor(1).submit(_hub().get_hf_file_metadata, url, token=token, timeout=5).result(timeout=seconds)


def _cached(entry: Entry, file: str) -> Path | None:
    found = _hub().try_to_load_from_cache(entry.repo, file, revision=entry.revision)
    return Path(found) if isinstance(found, str) else None


def fetch_file(entry: Entry, file: str) -> Path | None:
    """One public file of a model's repository, from the Hub's cache or the Hub; None within 10 s where there is no network."""
    try:
        if not _cached(entry, file):
            _reach(entry, file, token=False)
        return Path(_hub().hf_hub_download(entry.repo, file, revision=entry.revision, token=False))
    except Exception:
        return None


def fetch(entry: Entry) -> Path:
    """The folder of a model from the Hub: from its cache if whole there, else downloaded (one cut short goes on where it stopped)."""
    index = _cached(entry, "model.safetensors.index.json")
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index else {"model.safetensors"}
    files = [_cached(entry, file) for file in ("config.json", "tokenizer.json", *shards)]
    if all(files):
        return files[0].parent
    token = os.environ.get("HF_TOKEN") or _hub().get_token()
    if entry.gated and not token:
        raise CourseError(REFUSALS["no token"].format(entry))
    try:
        _reach(entry, "config.json", token)
        at16, at4 = (budget.total(entry.memory(bits)) / 1e9 for bits in (16, 4))
        memory = f"{at16:.1f} GB of memory at 16 bits, {at4:.1f} GB at 4"
        print(f"Downloading {entry.name} ({entry.licence}), {entry.download_bytes / 1e9:.1f} GB, once; it needs {memory} (estimates).", flush=True)
        return Path(_hub().snapshot_download(entry.repo, revision=entry.revision, token=token, allow_patterns=FILES))
    except Exception as error:
        kinds = ["disk full"] if getattr(error, "errno", None) == errno.ENOSPC else [kind.__name__ for kind in type(error).__mro__]
        says = next(says for kind, says in REFUSALS.items() if kind in kinds)
        raise CourseError(says.format(entry, kind=kinds[0], status=getattr(getattr(error, "response", None), "status_code", ""))) from None


REFUSALS = {  # by the kind of error, the special ones before those that they are kinds of
    "no token": "{0.name} is gated: accept the {0.licence} at https://huggingface.co/{0.repo}, then set HF_TOKEN to a read token of that account.",
    "GatedRepoError": "The Hub refuses {0.name}: accept the {0.licence} at https://huggingface.co/{0.repo} with the account of your HF_TOKEN.",
    "RevisionNotFoundError": "The Hub no longer has {0.repo} at {0.revision}: choose another model (COURSE_MODEL), and please report it.",
    "RepositoryNotFoundError": "The Hub shows no {0.repo} to your token: check HF_TOKEN, unset it, or choose another model (COURSE_MODEL).",
    "HfHubHTTPError": "The Hub answered HTTP {status} for {0.name}: check HF_TOKEN if that is 401, else wait a minute and run again.",
    "disk full": "The disk filled up while downloading {0.name}: free some and run again; what has been downloaded is kept.",
    "Exception": "Could not fetch {0.name} from the Hub ({kind}): is there a network? Run again (what has been downloaded is kept), "
    f"or unset COURSE_MODEL: {COURSE_MODEL} needs none.",
}
