"""A folder that is to be given to others: the files in it, their hashes, and what must not be in it (pickles, code, paths, tokens, links)."""

import itertools
import os
import re
import stat
from pathlib import Path

from helpers.files import CourseError, sha256
from helpers.runtime import ROOT, cache_dir, runs_dir

CARD, BILL, SIGNATURE = "README.md", "bom.cdx.json", "model.sig"  # names that the Hub, CycloneDX's tools and model-signing know
HUBS = re.compile(r"\.gitattributes|\.cache/huggingface/.*")  # what the Hub, and its client, put beside a model's files: no loader reads them
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".keras", ".msgpack")
CODE = (".py", ".pyc", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".ipynb")
WEIGHTS = (".safetensors", ".gguf")
MOST = 10_000  # files
WHOLE = 64_000_000  # bytes of a file that are searched
SECRETS = {  # what would be taken for a key to something; each begins with fixed letters, which is quick to search for
    "a token of the Hugging Face Hub": rb"hf_(?<!\whf_)[A-Za-z0-9]{20,}",
    "a token of GitHub": rb"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}",
    "a key of a hosted model": rb"sk-(?<!\wsk-)(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}",
    "a key of a cloud": rb"A(?:KIA|SIA|Iza)[\w-]{16,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a web token": rb"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
}
PLACES = (  # of a machine: /home/ada/…, C:\Users\ada\…; not the end of a longer name or of an address
    rb"/(?<![\w.-]/)(?:home|root|Users|content|tmp|mnt|workspace|kaggle|private|var/folders)/\w",
    rb":(?<=\b[A-Za-z]:)[\\/]+(?:Users|Temp|Windows)\b",
)


def files(folder: Path) -> dict[str, Path]:
    """Name (with forward slashes, sorted) and path of every file of a folder, without the Hub's own. CourseError where one is no plain file."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CourseError(f"There is no folder {folder.name}: export an adapter or a merged model first.")
    found = {}
    for place, folders, names in os.walk(folder):
        for name in itertools.chain(names, (f for f in folders if (Path(place) / f).is_symlink())):
            path = Path(place) / name
            label = path.relative_to(folder).as_posix()
            if HUBS.fullmatch(label):
                continue
            if not stat.S_ISREG(path.lstat().st_mode):
                raise CourseError(f"{label} in {folder.name}/ is no plain file, but a link or a pipe: put the file itself there, or download with local_dir=.")
            found[label] = path
            if len(found) > MOST:
                raise CourseError(f"{folder.name}/ has more than {MOST:,} files: this is no exported model.")
    if not found:
        raise CourseError(f"{folder.name}/ is empty: export an adapter or a merged model into it first.")
    return dict(sorted(found.items()))


def hashes(folder: Path, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Name and sha256 of every file of a folder, but for those named."""
    return {name: sha256(path) for name, path in files(folder).items() if name not in without}


def compared(expected: dict[str, str], found: dict[str, str], said: str) -> list[str]:
    """What differs between two tables of hashes, a sentence a file. `said`: who gave the expected ones, such as "the bill"."""
    problems = []
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            problems.append(f"{name} is missing: {said} names it.")
        elif name not in expected:
            problems.append(f"{name} was added: {said} doesn't name it.")
        elif expected[name] != found[name]:
            kind = "The chat template" if "chat_template" in name else "The file"
            problems.append(f"{kind} {name} was changed: its sha256 is no longer the one in {said}.")
    return problems


def problems(folder: Path) -> list[str]:
    """What keeps a folder from being given away, a sentence each; what was found is named, never shown."""
    found = []
    own = [re.escape(str(place)).encode() for place in {ROOT, Path.home(), cache_dir(), runs_dir()} if len(place.parts) > 2]
    for name, path in files(folder).items():
        if name.lower().endswith(PICKLES) or _is_pickle(path):
            found.append(f"{name} is a pickle, or may hold one, and could run anything where it is loaded: save as safetensors.")
            continue
        if name.lower().endswith(CODE):
            found.append(f"{name} is code: who loads a model should not have to trust any.")
        text = _searched(path)
        for what, pattern in SECRETS.items():
            if hit := re.search(pattern, text):
                found.append(f"{name}, line {_line(text, hit)}, holds what looks like {what}: take it out, and revoke it if it was ever given away.")
        hits = [hit for pattern in (*PLACES, *own) if (hit := re.search(pattern, text))]
        if hits:
            found.append(f"{name}, line {min(_line(text, hit) for hit in hits)}, holds a path of a machine: name the model as the Hub does.")
    return found


def check(folder: Path) -> None:
    """CourseError where a folder holds what must not be given away: the first three things, a sentence each."""
    if found := problems(folder):
        more = f" And {len(found) - 3} more." if len(found) > 3 else ""
        raise CourseError(f"{Path(folder).name}/ was not taken: {' '.join(found[:3])}{more}")


def _searched(path: Path) -> bytes:
    """What of a file is searched: of weights their header alone (safetensors' is JSON, GGUF's within the first megabytes)."""
    with open(path, "rb") as file:
        if path.suffix == ".safetensors":
            return file.read(min(WHOLE, int.from_bytes(file.read(8), "little")))
        return file.read(8_000_000 if path.suffix == ".gguf" else WHOLE)


def _line(text: bytes, hit) -> int:
    return text.count(b"\n", 0, hit.start()) + 1


def _is_pickle(path: Path) -> bool:
    """Whether a file begins as a pickle of protocol 2 or later, or as a zip, torch's wrapping of one."""
    with open(path, "rb") as file:
        start = file.read(4)
    return start == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and not path.name.endswith(WEIGHTS))
