"""Exercises of notebook 06: what their checks try, and the mistakes that they know."""

import json

from helpers.checks import NOT_YET, Verdict, check, missing, right, wrong

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@check
def which_differ(answer) -> Verdict:
    """06.1: a function (listed, found), two dicts of name: sha256 -> the sorted names of files that were changed, added or taken away."""
    listed = {"config.json": "aa", "model.safetensors": "bb", "tokenizer.json": "cc", "chat_template.jinja": "dd", "NOTICE": "bb"}
    found = {"chat_template.jinja": "d0", "extra.py": "ee", "model.safetensors": "bb", "config.json": "aa", "NOTICE": "bb"}
    given = answer(dict(listed), dict(found))
    if missing(given):
        return NOT_YET
    if isinstance(given, str | bytes) or not hasattr(given, "__iter__"):
        return wrong(f"a list of names is asked for, and {type(given).__name__} came.")
    given, wanted = list(given), ["chat_template.jinja", "extra.py", "tokenizer.json"]
    if given == wanted and list(answer(dict(listed), dict(listed))) == []:
        return right("The three ways in which a folder can differ from its bill: each is an attack, or a broken download.")
    if given == wanted:
        return wrong("a folder that is as its bill says has nothing to report: the list must be empty then.")
    if sorted(map(str, given)) == wanted:
        return wrong("the right names, in another order than the alphabet's.")
    if set(map(str, given)) & {"aa", "bb", "cc", "dd", "d0", "ee"}:
        return wrong("those are hashes: give the names that they belong to.")
    for hint, name in (
        ("a file that nobody listed goes unseen, and code in it could be run.", "extra.py"),
        ("a file that is gone goes unseen: the loader would take a default in its place.", "tokenizer.json"),
        ("a file with the same name and other bytes goes unseen.", "chat_template.jinja"),
    ):
        if name not in given:
            return wrong(hint)
    return wrong(f"{sorted(set(map(str, given)) - set(wanted))[0]!r} is as it was listed.")


@check
def hash_template(answer) -> Verdict:
    """06.2: a function of a folder's text files (name: text) -> hex sha256 of the chat template that its tokenizer writes prompts by."""
    settings = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE, "model_max_length": 8192}

    def inside(order=1, indent=None, **changes):
        return {"tokenizer_config.json": json.dumps(dict(list((settings | changes).items())[::order]), indent=indent)}

    first = answer(inside())
    if missing(first):
        return NOT_YET
    if not isinstance(first, str) or len(first) != 64:
        return wrong("64 hexadecimal digits are asked for: sha256 over the text's UTF-8 bytes, as a string.")
    if first == answer(inside(chat_template=TEMPLATE.replace("assistant", "x").replace("role", "name"))):
        return wrong("another template gives the same hash: nobody would notice that prompts have another form.")
    if first == answer(inside(chat_template=TEMPLATE.replace("\n", " "))) or first == answer(inside(chat_template=TEMPLATE + "\n")):
        return wrong("a line break more or less is another prompt, of other tokens: hash the template as it is.")
    if first != answer(inside(order=-1)) or first != answer(inside(indent=2)):
        return wrong("the same settings in another order, or indented, give another hash: read the JSON, don't hash its text.")
    if first != answer(inside(model_max_length=4096)):
        return wrong("a setting that isn't the template changes the hash.")
    moved = {key: value for key, value in settings.items() if key != "chat_template"}
    try:
        alone = answer({"tokenizer_config.json": json.dumps(moved), "chat_template.jinja": TEMPLATE})
        both = answer(inside(chat_template="{{ old }}") | {"chat_template.jinja": TEMPLATE})
    except Exception as error:
        return wrong(f"newer folders keep the template in a file of its own, chat_template.jinja; there your code stops with {type(error).__name__}.")
    if first != alone:
        return wrong("the same template in chat_template.jinja must give the same hash.")
    if first != both:
        return wrong("where both are there, the file chat_template.jinja is the one that transformers takes.")
    return right("It follows the template wherever it is kept, and nothing else: what a bill of materials should hold.")
