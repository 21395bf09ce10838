"""Files that can run code when they are loaded: what a file really is, whatever its name says; a harmless pickle, who loads it, who refuses.

A pickle is a small program that builds objects, and one of its instructions calls any function by name. Here nothing is loaded in this
process: `harmless` writes a pickle that makes an empty folder, and `loaded` tries it in a process and a temporary folder of its own.
"""

import json
import os
import pickletools
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from helpers.files import CourseError

HEAD = 1 << 20  # bytes of a file that are looked at
MARKER = "the-pickle-ran"  # the empty folder or file that `harmless` makes where it is loaded
CALLS = ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "REDUCE")
SIGNS = {b"GGUF": "a GGUF file", b"\x93NUMPY": "a NumPy array (which may hold pickles)", b"\x7fELF": "a program", b"MZ": "a program", b"#!": "a script",
         b"\x89HDF": "an HDF5 file", b"\x1f\x8b": "a gzip archive", b"7z\xbc\xaf": "a 7z archive"}  # fmt: skip
HARMFUL = ("a pickle", "a zip archive with a pickle in it", "a program", "a script", "a NumPy array (which may hold pickles)", "a gzip archive", "a 7z archive")


def kind(path: Path) -> str:
    """What a file is by its first bytes: "safetensors", "a pickle", "text", …; nothing of it is loaded. See `HARMFUL` for those that can run something."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    size = path.stat().st_size
    if not head:
        return "an empty file"
    length = int.from_bytes(head[:8], "little")
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                inside = any(_is_pickle(archive.open(entry).read(1000)) for entry in archive.infolist()[:200])
        except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile):
            inside = True  # one that can't be looked into isn't trusted
        return "a zip archive with a pickle in it" if inside else "a zip archive"
    if head[8:9] == b"{" and 0 < length <= size - 8 and _is_json(head[8 : 8 + length]):  # first: a length may begin as a pickle does
        return "safetensors"
    if _is_pickle(head):
        return "a pickle"
    if head[8:9] == b"{" and length > 0:
        return "safetensors" if length <= size - 8 else "a safetensors file that breaks off in its header"
    for sign, what in SIGNS.items():
        if head.startswith(sign):
            return what
    try:
        text = head.decode("utf-8") if size <= HEAD else head[:-4].decode("utf-8")
        return "text" if "\0" not in text else "an unknown kind of file"
    except UnicodeDecodeError:
        return "an unknown kind of file"


def _is_json(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text.decode("utf-8")), dict)
    except (ValueError, RecursionError):
        return False


def _is_pickle(head: bytes) -> bool:
    """Whether bytes begin a pickle: protocols 2 to 5 say so themselves; older ones are read as instructions, which runs none of them."""
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    called = False
    try:
        for number, (instruction, argument, _) in enumerate(pickletools.genops(head)):
            if instruction.name in ("GLOBAL", "INST"):
                if not re.fullmatch(r"[\w.]+ [\w.]+", str(argument)):
                    return False
                called = True
            if instruction.name == "STOP":
                return called
            if number > 10_000:
                break
    except (ValueError, UnicodeDecodeError, IndexError, OverflowError) as error:  # text, or a pickle that breaks off
        return called and "exhausted" in str(error)
    return called


HARMLESS = {  # what `harmless` calls when it is loaded, instruction by instruction: (c) fetch it, (( … t) its arguments, (R) call it, (0) forget the result, (K 0) the value
    "os.mkdir": f"cos\nmkdir\n(V{MARKER}\ntR0K\0.",
    "io.open": f"cio\nopen\n(V{MARKER}\nVw\ntR0K\0.",
}


def harmless(path: Path, call: str = "os.mkdir") -> Path:
    """Writes a pickle that, when it is loaded, makes an empty folder (with `call="io.open"` an empty file) named `MARKER` beside it, and is the number 0."""
    path.write_bytes(HARMLESS[call].encode())
    return path


LOADERS = {  # how a file is loaded, each in a process of its own
    "pickle": "import pickle; pickle.load(open(path, 'rb'))",
    "torch.load, weights only": "import torch; torch.load(path, weights_only=True)",
    "torch.load, everything": "import torch; torch.load(path, weights_only=False)",
    "safetensors": "from safetensors import safe_open; safe_open(path, 'pt')",
}


def loaded(path: Path, how: str) -> dict:
    """Loads a file that `harmless` wrote as one of `LOADERS` does, in a process and a temporary folder of its own: {"ran": whether the marker
    appeared, "says": the error's last line, "" where there was none}. CourseError for any other file: nothing else is ever loaded."""
    if how not in LOADERS:
        raise CourseError(f"There is no loader {how!r}: take one of {', '.join(LOADERS)}.")
    with tempfile.TemporaryDirectory(prefix="pickle-", ignore_cleanup_errors=True) as folder:
        own, program = Path(folder) / "own.pkl", path.read_bytes()[:1000]
        if program.decode("latin-1") not in HARMLESS.values():
            raise CourseError(f"{path.name} isn't a pickle that this lesson wrote: it isn't loaded.")
        own.write_bytes(program)
        command = [sys.executable, "-I", "-c", f"path = 'own.pkl'\n{LOADERS[how]}"]
        environment = {name: value for name, value in os.environ.items() if name in ("PATH", "SYSTEMROOT", "TEMP", "TMP", "OMP_NUM_THREADS")}
        try:
            done = subprocess.run(command, cwd=own.parent, env=environment, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            raise CourseError("Loading the pickle took more than two minutes: this machine is very busy; try again.") from None
        said = [line for line in done.stderr.strip().split("\n") if re.match(r"[\w.]*(Error|Exception)\b", line)]
        return {"ran": (own.parent / MARKER).exists(), "says": said[-1][:160] if done.returncode and said else "failed" if done.returncode else ""}


def picklescan(path: Path) -> dict:
    """What picklescan finds: {"dangerous": bool, "globals": what the pickle would call, each with the verdict on its name}. It knows lists
    of names, good and bad ones; of others it says "suspicious", which isn't counted as dangerous. Nothing is loaded."""
    from picklescan.scanner import scan_file_path

    result = scan_file_path(str(path))
    return {"dangerous": bool(result.issues_count or result.scan_err), "globals": [f"{g.module}.{g.name} ({g.safety.value})" for g in result.globals]}


def fickling(path: Path) -> dict:
    """What fickling finds: {"dangerous": bool, "severity": its word, "says": lines}. It reads the pickle's program as Python; nothing is loaded."""
    code = "import json, sys\nfrom fickling.fickle import Pickled\nfrom fickling.analysis import check_safety\n"
    code += "found = check_safety(Pickled.load(open(sys.argv[1], 'rb').read()))\nprint(json.dumps([found.severity.name, str(found)]))"
    done = subprocess.run([sys.executable, "-I", "-c", code, str(path)], capture_output=True, text=True, timeout=120)  # on its own: it hooks into imports
    try:
        severity, says = json.loads(done.stdout.strip().split("\n")[-1])
    except (ValueError, IndexError):
        return {"dangerous": True, "severity": "UNREADABLE", "says": ["fickling can't read it as a pickle"]}
    return {"dangerous": severity != "LIKELY_SAFE", "severity": severity, "says": says.split("\n")}
