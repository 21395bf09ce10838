"""Models from the Hugging Face Hub: what one takes on this machine, fetched with one-sentence failures."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import huggingface_hub

from helpers import budget, times
from helpers.files import CourseError
from helpers.menu import COURSE_MODEL, Entry
from helpers.recipes import SFTRecipe, needs_checkpointing, step_gb
from helpers.runtime import device

FILES = ["*.json", "*.jinja", "model*.safetensors"]  # no pickles, no code, and not Mistral's second copy of its weights


def estimate(entry: Entry) -> str:
    """One sentence: the memory that answering and the course's training take, whether this machine has it, and the run's time."""
    recipe, here = SFTRecipe(), device()
    again = needs_checkpointing(recipe, entry.name)
    sizes = [budget.total(entry.memory(bits, here.dtype.itemsize)) / 1e9 for bits in (16, 4)] + [step_gb(recipe, entry.name, again)]
    at16, at4, step = (f"{gb:.1f} GB ({'fits' if gb <= here.memory_gb else 'does not fit'})" for gb in sizes)
    tokens, rate = times.training_pace()
    minutes = budget.training_seconds(entry.parameters, recipe.steps * recipe.batch_size * tokens, rate, again) / 60
    train = f"{step} to train at 4 bits{again * ' with gradient checkpointing'}, about {max(1, minutes):,.0f} minutes for {recipe.steps} steps"
    return f"Estimates for this machine's {here.memory_gb:.1f} GB: {at16} at 16 bits, {at4} at 4; {train}."


# ---------------------------------------------------------------- the Hub


def token() -> str | None:
    """The Hub's token, never shown: HF_TOKEN, else Colab's secret of that name, else what `hf auth login` stored here; None without one.

    Colab asks the learner for access to the secret; huggingface_hub, which would ask once more, isn't asked there.
    """
    try:
        from google.colab import userdata

        return os.environ.get("HF_TOKEN", "").strip() or userdata.get("HF_TOKEN").strip() or None
    except ImportError:  # not on Colab: the environment, then the stored one
        return huggingface_hub.get_token()
    except Exception as error:  # SecretNotFoundError, NotebookAccessError, TimeoutException or what may come
        print(f"No token ({type(error).__name__}): to use one, grant this notebook access to the secret HF_TOKEN (key symbol on the left).")


def _reach(entry: Entry, file: str, token, seconds: float = 8) -> None:
    """Asks the Hub for one file's header; raises what went wrong, after `seconds` at most.

    In a thread, because looking up a host has no time limit of its own; a download's own retries take 23 s without a network.
    """
    url = huggingface_hub.hf_hub_url(entry.repo, file, revision=entry.revision)
    ThreadPoolExecutor(1).submit(huggingface_hub.get_hf_file_metadata, url, token=token, timeout=5).result(timeout=seconds)


def _cached(entry: Entry, file: str) -> Path | None:
    found = huggingface_hub.try_to_load_from_cache(entry.repo, file, revision=entry.revision)
    return Path(found) if isinstance(found, str) else None


def fetch_file(entry: Entry, file: str) -> Path | None:
    """One public file of a model's repository, from the Hub's cache or the Hub; None within 10 s where there is no network."""
    try:
        if not _cached(entry, file):
            _reach(entry, file, token=False)
        return Path(huggingface_hub.hf_hub_download(entry.repo, file, revision=entry.revision, token=False))
    except Exception:
        return None


def fetch(entry: Entry) -> Path:
    """The folder of a model from the Hub: from its cache if whole there, else downloaded (one cut short goes on where it stopped)."""
    index = _cached(entry, "model.safetensors.index.json")
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index else {"model.safetensors"}
    files = [_cached(entry, file) for file in ("config.json", "tokenizer.json", *shards)]
    if all(files):
        return files[0].parent
    key = token() or False  # False: huggingface_hub looks for no other
    if entry.gated and not key:
        raise CourseError(REFUSALS["no token"].format(entry))
    about = f"Downloading {entry.name} ({entry.licence}), {entry.download_bytes / 1e9:.1f} GB, once. {estimate(entry)}"
    for wait in (5, 15, 45, 0):
        try:
            _reach(entry, "config.json", key)
            print(about, flush=True)
            return Path(huggingface_hub.snapshot_download(entry.repo, revision=entry.revision, token=key, allow_patterns=FILES))
        except Exception as error:
            error = next((e for e in (error, error.__cause__) if hasattr(e, "response")), error)
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if not wait or (status != 429 and status < 500):
                kinds = ["disk full"] if getattr(error, "errno", None) == 28 else [kind.__name__ for kind in type(error).__mro__]
                says = next(says for kind, says in REFUSALS.items() if kind in kinds)
                raise CourseError(says.format(entry, kind=kinds[0], status=status)) from None
            wait = min(60, int(asked)) if (asked := error.response.headers.get("Retry-After", "")).isdigit() else wait
        print(f"The Hub is busy (HTTP {status}): trying again in {wait} s.", flush=True)
        sleep(wait)


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
