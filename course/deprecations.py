"""Records every deprecation that notebooks set off, hidden ones too, by an IPython startup file that wraps warnings and logging."""

import functools
import json
import linecache
import logging
import os
import re
import sys
import warnings
from pathlib import Path

FILE = "COURSE_DEPRECATIONS"  # the environment variable that names the record
WORDS = re.compile(r"deprecat|will be removed|no longer supported", re.I)
ALLOWED = (  # the module that warned, how its message begins, and why that isn't the course's to mend
    ("torch.utils._pytree", "`isinstance(treespec, LeafSpec)` is deprecated", "torch's own, when it is imported"),
    ("torch.jit._script", "`torch.jit.script_method` is deprecated", "torch's own, when bitsandbytes or PEFT is imported"),
    ("transformers.training_args", "`gradient_checkpointing` is deprecated", "TRL 1.16's configs set it; Colab's transformers knows no other name"),
    ("transformers.modeling_utils", "`is_gradient_checkpointing` is deprecated", "PEFT asks for it as it wraps a model, TRL in DPO's loss"),
    ("tqdm.auto", "Using `tqdm.autonotebook.tqdm` in notebook mode", "an experiment of tqdm's, which hushes this itself; nothing goes"),
    ("matplotlib._fontconfig_pattern", "'", "Colab's matplotlib on a newer pyparsing, whose messages begin with the old name in quotes"),
    ("matplotlib._mathtext", "'", "the same"),
    ("pyparsing.util", "'parseAll' argument is deprecated", "the same, said by pyparsing of its caller"),
    ("IPython.html", "The `IPython.html` package has been deprecated", "Colab's IPython, when transformers looks for widgets"),
)


def record() -> None:
    """Called in a kernel before any library is imported; each different deprecation becomes one JSON line."""
    seen, target = set(), os.environ[FILE]

    def note(message, category, module, frame):
        tells = isinstance(category, type) and issubclass(category, (DeprecationWarning, PendingDeprecationWarning, FutureWarning))
        if not tells and not WORDS.search(str(message)):
            return
        while frame and not re.match(r"(__main__|helpers|course)\b", frame.f_globals.get("__name__", "")):
            frame = frame.f_back
        ours = frame and f"{frame.f_globals['__name__']}: {linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()}"
        entry = {"module": module, "category": getattr(category, "__name__", "log"), "message": str(message)}
        line = json.dumps(entry | {"ours": ours or "not called by the course"})
        if line not in seen:
            seen.add(line)
            with open(target, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def blamed(frame, level, skip=()):  # the frame that `stacklevel` means; the import machinery's own don't count
        def hidden(f):
            name = f.f_code.co_filename
            return ("importlib" in name and "_bootstrap" in name) or name.startswith(tuple(skip))

        while frame.f_back and (level > 1 or hidden(frame)):
            frame = frame.f_back
            level -= not hidden(frame)
        return frame.f_globals.get("__name__", "")

    warn, warn_explicit, show = warnings.warn, warnings.warn_explicit, warnings._showwarnmsg

    @functools.wraps(warn)
    def noting_warn(message, category=None, stacklevel=1, source=None, **more):
        kind = type(message) if isinstance(message, Warning) else category or UserWarning
        caller = sys._getframe(1)
        note(message, kind, blamed(caller, stacklevel, more.get("skip_file_prefixes", ())), caller)
        return warn(message, category, max(stacklevel, 1) + 1, source, **more)

    @functools.wraps(warn_explicit)
    def noting_warn_explicit(message, category, filename, lineno, module=None, *args, **more):
        note(message, type(message) if isinstance(message, Warning) else category, module or Path(filename).stem, sys._getframe(1))
        return warn_explicit(message, category, filename, lineno, module, *args, **more)

    def noting_show(message):  # the only place where a warning raised in C comes by, if it is shown
        caller = sys._getframe(1)
        if caller.f_globals is not globals():  # else it came through the two above
            note(message.message, message.category, caller.f_globals.get("__name__", ""), caller)
        show(message)

    def noting(method):  # a logger's method, looked at before its level decides
        @functools.wraps(method)
        def log(self, msg, *args, **more):
            try:
                text = str(msg) % args if args else str(msg)
            except (TypeError, ValueError):
                text = str(msg)
            note(text, None, getattr(self, "name", ""), sys._getframe(1))
            return method(self, msg, *args, **more)

        return log

    warnings.warn, warnings.warn_explicit, warnings._showwarnmsg = noting_warn, noting_warn_explicit, noting_show
    warnings.filterwarnings("default", category=DeprecationWarning, module=r"(helpers|course)\b")  # C's in our modules are shown, too
    for kind in (logging.Logger, logging.LoggerAdapter):
        for name in ("info", "warning", "error"):
            setattr(kind, name, noting(getattr(kind, name)))


def environment(folder: Path) -> dict[str, str]:
    """What a process needs so that the kernels it starts record what is deprecated, in a new folder."""
    startup = folder / "profile_default" / "startup"
    startup.mkdir(parents=True)
    read = f"open({str(Path(__file__))!r}, encoding='utf-8').read()"
    code = f"scope = {{'__name__': 'deprecations'}}; exec({read}, scope); scope['record'](); del scope\n"
    (startup / "00-deprecations.py").write_text(code, encoding="utf-8")
    return {"IPYTHONDIR": str(folder), FILE: str(folder / "record.jsonl")}


def read(environment: dict[str, str]) -> list[dict]:
    """What was recorded, each thing once."""
    path = Path(environment[FILE])
    lines = dict.fromkeys(path.read_text(encoding="utf-8").splitlines()) if path.exists() else ()
    return [json.loads(line) for line in lines]


def reason(entry: dict) -> str | None:
    """Why it is allowed; None if it isn't."""
    return next((why for module, start, why in ALLOWED if entry["module"] == module and entry["message"].startswith(start)), None)


def report(environment: dict[str, str]) -> int:
    """Prints what was recorded, what is allowed once and shortly; returns 1 when something isn't allowed."""
    said, failed = {}, 0
    for entry in read(environment):
        what = f"{entry['category']} of {entry['module']}: {entry['message']}"
        if why := reason(entry):
            said[f"allowed: {what} ({why})"] = None
        else:
            said[f"DEPRECATED: {what}\n   set off by {entry['ours']}"], failed = None, 1
    print("".join(f"{line}\n" for line in said), end="", flush=True)
    return failed
