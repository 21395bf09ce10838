"""YAML as text, in the part of it that configs need: flat keys under comments, short lists, one dict below a key. For files that people read."""

import json
import re

WORDS = ("yes", "no", "on", "off", "true", "false", "null", "y", "n")  # YAML 1.1 takes them for something else than texts


def value_text(value) -> str:
    """A scalar or a short list as YAML 1.1 readers take it: 1e-05 would be a text to them, and a bare `no` a truth value."""
    if isinstance(value, float):
        text = repr(value)
        return text if "e" not in text else f"{value:.12f}".rstrip("0")
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value) and value.lower() not in WORDS:
        return value
    if isinstance(value, list):
        return f"[{', '.join(map(value_text, value))}]"
    return json.dumps(value)


def file_text(comments: list[str], sections: dict[str, dict]) -> str:
    """A file: comments on top, then each section's keys under its name. A value may be a dict, or a list with one dict, of such values."""
    lines = [f"# {comment}" for comment in comments]
    for name, keys in sections.items():
        lines += ["", f"# {name}"]
        for key, value in keys.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                inner = [f"    {k}: {value_text(v)}" for k, v in value[0].items()]
                lines += [f"{key}:", "  -" + inner[0][3:], *inner[1:]]
            elif isinstance(value, dict):
                lines += [f"{key}:", *(f"  {k}: {value_text(v)}" for k, v in value.items())]
            else:
                lines.append(f"{key}: {value_text(value)}")
    return "\n".join(lines) + "\n"
