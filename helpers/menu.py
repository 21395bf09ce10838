"""The menu of models: licence, pinned revision, shape and sizes of each."""

import os
from dataclasses import dataclass, field

from helpers import budget
from helpers.files import CourseError

COURSE_MODEL = "SmolLM2-135M-Instruct"
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

    parameters = property(lambda self: budget.total(budget.parameters(self.config())))
    download_bytes = property(lambda self: 2 * self.parameters)  # an estimate: bfloat16 safetensors; the tokenizer adds a few MB

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
    """The model of that name or Hub id (as exported adapters and models name theirs), else the one that COURSE_MODEL names, else the course model."""
    name = name or os.environ.get("COURSE_MODEL") or COURSE_MODEL
    name = next((entry.name for entry in MENU.values() if entry.repo == name), name)
    if name not in MENU:
        raise CourseError(f"Unknown model {name!r}: the menu has {', '.join(MENU)}. Set COURSE_MODEL to one of them, or unset it.")
    return MENU[name]
