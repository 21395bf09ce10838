"""A signature over every file of an exported model, with an elliptic-curve key made on the spot, and verified before anything is loaded.

Through model-signing (OpenSSF), whose own command verifies it as well. What it says: whoever holds this private key signed these very
bytes. Not who that is (ask for the public key by another way than the model came), nor that the model is any good.
"""

import base64
import contextlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

from helpers import adapters, vetting
from helpers.files import CourseError, make_folder, told, write_whole
from helpers.shipping import parcel

PRIVATE, PUBLIC = "signing-key.pem", "signing-key.pub"
MISSING = 'Signing takes model-signing, which isn\'t installed here: pip install -c constraints.txt -e ".[ship]"'
ASIDE = [parcel.SIGNATURE, ".gitattributes", ".cache/huggingface"]  # the signature itself, and what the Hub puts there (parcel.HUBS)


def make_key(folder: Path) -> tuple[Path, Path]:
    """Makes a key pair (P-256) in a folder: (private, public), two PEM files. The private one is for this user's eyes alone (on Windows, as
    the folder's own rights have it). CourseError where a key is there already: a new one would orphan what the old one signed."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    private, public = Path(folder) / PRIVATE, Path(folder) / PUBLIC
    if private.exists() or public.exists():
        raise CourseError(f"A key is in {Path(folder).name}/ already: use it, or make another in another folder. What it signed needs its public half.")
    make_folder(Path(folder))
    key = ec.generate_private_key(ec.SECP256R1())
    with told(private.name):
        try:
            with open(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
        except OSError:
            private.unlink(missing_ok=True)  # never half a key
            raise
    write_whole(public, key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo).decode())
    return private, public


def sign(folder: Path, private: Path) -> Path:
    """Signs every file of a folder (card and bill too, so make these first) and writes model.sig into it, in place of an older one.

    CourseError where the folder holds what must not be given away (`parcel.check`), or the key itself lies in it.
    """
    folder, private = Path(folder), Path(private)
    if private.resolve().is_relative_to(folder.resolve()):
        raise CourseError(f"The private key lies in {folder.name}/, which is to be given away: move it elsewhere, and better make a new one.")
    parcel.check(folder)
    library = _library()
    _check_private(private)
    with told(parcel.SIGNATURE), tempfile.TemporaryDirectory() as place, _silent():
        made = Path(place) / parcel.SIGNATURE
        library.signing.Config().use_elliptic_key_signer(private_key=private).set_hashing_config(_hashing()).sign(folder, made)
        write_whole(folder / parcel.SIGNATURE, made.read_text(encoding="utf-8"))
    return folder / parcel.SIGNATURE


def verify(folder: Path, public: Path) -> None:
    """Whether every file is as the holder of a key signed it: nothing happens. CourseError: what isn't, in a sentence a file."""
    folder = Path(folder)
    found, path = parcel.hashes(folder, (parcel.SIGNATURE,)), folder / parcel.SIGNATURE
    if not path.exists():
        raise CourseError(f"{folder.name}/ was not taken: it isn't signed ({parcel.SIGNATURE} is missing).")
    library, refused = _library(), f"{folder.name}/ was not taken: "
    if not Path(public).is_file():
        raise CourseError(f"There is no public key {Path(public).name}: get it from whoever signed the model, by another way than the model came.")
    with _silent():
        try:
            library.verifying.Config().use_elliptic_key_verifier(public_key=Path(public)).set_hashing_config(_hashing()).verify(folder, path)
            return
        except Exception as error:  # ValueError, InvalidSignature, and whatever a stranger's file sets off in a parser
            says, kind = str(error), type(error).__name__
    if "Key mismatch" in says:
        raise CourseError(f"{refused}it was signed with another key than {Path(public).name}. Only the key of the one you trust counts.")
    if "Signature mismatch" in says:  # so the signature itself is the key's: what it lists can be believed
        differ = parcel.compared(_signed(path), found, "the signature")
        raise CourseError(refused + " ".join(differ or ["it isn't what was signed."]))
    if kind == "InvalidSignature":
        raise CourseError(f"{refused}its signature doesn't fit the key {Path(public).name}: it was changed, or made with another key.")
    raise CourseError(f"{refused}{parcel.SIGNATURE} or {Path(public).name} can't be read ({kind}): get both again from their sources.")


def load_adapter(folder: Path, public: Path, bits: int = 4, dtype=None):
    """The course model with a signed adapter on it: verified first, then vetted as any stranger's, from a copy that nobody else writes to."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:  # Windows: a loaded file may still be held
        copy = Path(place) / Path(folder).name
        for name, path in parcel.files(folder).items():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy / name)
        verify(copy, public)
        alone = make_folder(Path(place) / "adapter")
        for name in (vetting.CONFIG, vetting.WEIGHTS):
            if not (copy / name).exists():
                raise CourseError(f"There is no adapter in {Path(folder).name}/: {name} is missing.")
            os.replace(copy / name, alone / name)  # card, bill and signature stay behind: an adapter is two files
        return adapters.load_adapter(alone, bits, dtype)


def _check_private(private: Path) -> None:
    """CourseError where a file is no private key to sign with."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        if isinstance(form.load_pem_private_key(private.read_bytes(), None), ec.EllipticCurvePrivateKey):
            return
        kind = "of another kind"
    except Exception as error:  # OSError, ValueError, TypeError for one with a password, UnsupportedAlgorithm
        kind = type(error).__name__
    raise CourseError(f"{private.name} can't be used ({kind}): name a private key that make_key() made.")


def _hashing():
    """How files are hashed: sha256 each, every one but `ASIDE` (model-signing alone would leave out all of .git/ and .github/)."""
    return _library().hashing.Config().set_ignored_paths(paths=ASIDE, ignore_git_paths=False)


def _signed(path: Path) -> dict[str, str]:
    """Names and sha256 that a signature lists."""
    payload = json.loads(path.read_text(encoding="utf-8"))["dsseEnvelope"]["payload"]
    return {item["name"]: item["digest"] for item in json.loads(base64.b64decode(payload))["predicate"]["resources"]}


def _library():
    try:
        import model_signing
    except ImportError:
        raise CourseError(MISSING) from None
    return model_signing


@contextlib.contextmanager
def _silent():
    """Without the remarks that model-signing prints about older signatures: what counts is told in a sentence."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
