"""Signatures: what was signed is taken, and a changed byte, template, file or key is refused in a sentence; the private key stays out."""

import json
import os
import shutil
import stat

import pytest

from helpers.files import CourseError
from helpers.shipping import parcel, signing


@pytest.fixture
def signed(exported, tmp_path):
    """A signed folder and the public key."""
    (exported / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    private, public = signing.make_key(tmp_path / "keys")
    signing.sign(exported, private)
    return exported, public


def test_what_was_signed_is_taken_wherever_it_lies(signed, tmp_path):
    folder, public = signed
    signing.verify(folder, public)
    moved = shutil.copytree(folder, tmp_path / "downloads" / "another name")
    (moved / ".gitattributes").write_text("x", encoding="utf-8")  # as the Hub adds it
    (moved / ".cache" / "huggingface").mkdir(parents=True)
    (moved / ".cache" / "huggingface" / "x.metadata").write_text("x", encoding="utf-8")
    signing.verify(moved, public)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def drop_hint(path):
    """As an attacker would who signs with a key of his own: without the hint that names it."""
    bundle = json.loads(path.read_text(encoding="utf-8"))
    bundle["verificationMaterial"]["publicKey"]["hint"] = ""
    path.write_text(json.dumps(bundle), encoding="utf-8")


CHANGES = {
    "a byte": (lambda f: flip(f / "adapter_model.safetensors"), "The file adapter_model.safetensors was changed: its sha256 is no longer the one in the signature"),
    "the template": (lambda f: (f / "chat_template.jinja").write_text("{{ evil }}", encoding="utf-8"), "The chat template chat_template.jinja was changed"),
    "a file more": (lambda f: (f / "extra.txt").write_text("x", encoding="utf-8"), "extra.txt was added: the signature doesn't name it"),
    "a file in .git": (lambda f: ((f / ".git").mkdir(), (f / ".git" / "x").write_text("x", encoding="utf-8")), ".git/x was added"),
    "a file less": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing: the signature names it"),
    "no signature": (lambda f: (f / "model.sig").unlink(), "it isn't signed"),
    "half a signature": (lambda f: (f / "model.sig").write_text("{", encoding="utf-8"), "can't be read"),
    "an empty one": (lambda f: (f / "model.sig").write_text("{}", encoding="utf-8"), "can't be read"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_each_change_is_refused_in_a_sentence(signed, what):
    folder, public = signed
    change, says = CHANGES[what]
    change(folder)
    with pytest.raises(CourseError, match="flights-sql/ was not taken: ") as error:
        signing.verify(folder, public)
    assert says in str(error.value) and len(str(error.value)) < 300


def test_a_foreign_key_is_refused_with_its_hint_and_without(signed, tmp_path, capsys):
    folder, public = signed
    other, foreign = signing.make_key(tmp_path / "foreign")
    with pytest.raises(CourseError, match="it was signed with another key than signing-key.pub"):
        signing.verify(folder, foreign)
    flip(folder / "adapter_model.safetensors")
    signing.sign(folder, other)  # changed, and signed anew by somebody else
    with pytest.raises(CourseError, match="it was signed with another key"):
        signing.verify(folder, public)
    drop_hint(folder / "model.sig")
    with pytest.raises(CourseError, match="its signature doesn't fit the key"):
        signing.verify(folder, public)
    assert capsys.readouterr().out == ""


def test_the_list_inside_a_signature_cannot_be_changed(signed):
    import base64

    folder, public = signed
    flip(folder / "adapter_model.safetensors")
    bundle = json.loads((folder / "model.sig").read_text(encoding="utf-8"))
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    payload["predicate"]["resources"][1]["digest"] = parcel.hashes(folder)["adapter_model.safetensors"]
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    (folder / "model.sig").write_text(json.dumps(bundle), encoding="utf-8")
    with pytest.raises(CourseError, match="its signature doesn't fit the key"):
        signing.verify(folder, public)


def test_the_private_key_is_the_users_alone_and_never_in_the_folder(exported, tmp_path):
    private, public = signing.make_key(tmp_path / "keys")
    assert private.read_text(encoding="utf-8").startswith("-----BEGIN PRIVATE KEY-----") and b"PUBLIC KEY" in public.read_bytes()
    if os.name != "nt":
        assert stat.S_IMODE(private.stat().st_mode) == 0o600
    with pytest.raises(CourseError, match="A key is in keys/ already"):
        signing.make_key(tmp_path / "keys")
    inside, _ = signing.make_key(exported / "keys")
    with pytest.raises(CourseError, match="The private key lies in flights-sql/"):
        signing.sign(exported, inside)
    with pytest.raises(CourseError, match="keys/signing-key.pem, line 1, holds what looks like a private key"):
        signing.sign(exported, private)
    assert not (exported / "model.sig").exists()


def test_what_is_no_key_is_told(signed, tmp_path):
    folder, public = signed
    before = (folder / "model.sig").read_bytes()
    for private in (public, tmp_path / "nowhere.pem"):
        with pytest.raises(CourseError, match="can't be used"):
            signing.sign(folder, private)
    assert (folder / "model.sig").read_bytes() == before
    with pytest.raises(CourseError, match="There is no public key nowhere.pub"):
        signing.verify(folder, tmp_path / "nowhere.pub")


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_is_refused_on_both_sides(signed, tmp_path):
    folder, public = signed
    (folder / "README.md").symlink_to(public)
    with pytest.raises(CourseError, match="README.md in flights-sql/ is no plain file"):
        signing.verify(folder, public)


@pytest.mark.slow
@pytest.mark.usefixtures("short_model")
def test_a_signed_adapter_loads_and_a_changed_one_does_not(tmp_path):
    import torch
    from peft import get_peft_model

    from helpers import adapters, models, recipes

    model = get_peft_model(models.load_model(16, torch.float32), recipes.peft_config(recipes.SFTRecipe(rank=2)))
    folder = adapters.export_adapter(model, tmp_path / "flights-sql")
    (folder / "README.md").write_text("# a card", encoding="utf-8")
    private, public = signing.make_key(tmp_path / "keys")
    signing.sign(folder, private)
    assert signing.load_adapter(folder, public, bits=16, dtype=torch.float32).peft_config["default"].r == 2
    flip(folder / "adapter_model.safetensors")
    with pytest.raises(CourseError, match="adapter_model.safetensors was changed"):
        signing.load_adapter(folder, public, bits=16)
