"""To the Hugging Face Hub, dry run by default: what would go where, seen by whom; then all of it in one commit, or nothing.

The token is asked for only when something is sent, and no message ever holds it.
"""

import errno
import re
from dataclasses import dataclass
from pathlib import Path

from helpers import hub
from helpers.files import CourseError
from helpers.shipping import parcel

BIG = 5e9  # bytes that the Hub takes in one file without special means


@dataclass(frozen=True)
class Plan:
    """What would be published: to `repo` on the Hub (owner/name), private or public, these files (name: bytes)."""

    repo: str
    private: bool
    files: dict[str, int]
    published: str | None = None  # the commit's address, once it was sent

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.files.values())

    def table(self):
        """The files as a DataFrame: name, megabytes."""
        import pandas as pd

        return pd.DataFrame([(name, round(size / 1e6, 3)) for name, size in self.files.items()], columns=["file", "MB"])

    def __str__(self) -> str:
        seen = "private: you alone see it" if self.private else "PUBLIC: everybody sees it, and copies stay where it is taken back"
        state = f"published: {self.published}" if self.published else "a dry run: nothing was sent, nothing was asked"
        return f"{len(self.files)} files, {self.total / 1e6:.1f} MB, to https://huggingface.co/{self.repo} ({seen}); {state}"


def plan(folder: Path, repo: str, private: bool = True) -> Plan:
    """What `push` would send. CourseError where the folder holds what must not be given away, or lacks what the Hub's readers need."""
    if not re.fullmatch(r"(?!.*(?:--|\.\.))[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", repo or "") or repo.endswith((".", "-", ".git")):
        raise CourseError("Name the place on the Hub as owner/name, as in ada/flights-sql: your account (or organisation), a slash, the model's name.")
    parcel.check(folder)
    sizes = {name: path.stat().st_size for name, path in parcel.files(folder).items()}
    if not any(name.endswith(parcel.WEIGHTS) for name in sizes):
        raise CourseError(f"{Path(folder).name}/ has no weights (.safetensors or .gguf): export a model into it first.")
    if parcel.CARD not in sizes:
        raise CourseError(f"{Path(folder).name}/ has no model card: write one first (card.write), so that nobody has to guess what this is.")
    if big := [name for name, size in sizes.items() if size > BIG]:
        raise CourseError(f"{big[0]} has more than {BIG / 1e9:.0f} GB: save the model in smaller pieces (max_shard_size).")
    return Plan(repo, private, sizes)


def push(folder: Path, repo: str, private: bool = True, dry_run: bool = True) -> Plan:
    """Publishes a folder on the Hub, in one commit; by default only tells what would be sent.

    A repository that is yours gets a new commit and keeps its other files; it must be as private as asked. CourseError: why nothing was
    published (no token, not yours, no network, a full disk …), with what to do. What it had made by then is removed again.
    """
    planned = plan(folder, repo, private)
    if dry_run:
        return planned
    import huggingface_hub

    if not (key := hub.token()):
        raise CourseError("There is no token, so nothing was sent: make one with write access (huggingface.co, Settings, Access Tokens) and set HF_TOKEN.")
    if any(key.encode() in path.read_bytes() for name, path in parcel.files(folder).items() if not name.endswith(parcel.WEIGHTS)):
        raise CourseError(f"Your own token stands in a file of {Path(folder).name}/: take it out, and revoke it if it was ever given away.")
    api, made = huggingface_hub.HfApi(token=key), False
    try:
        made = _make_place(api, repo, private)
        operations = [huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in parcel.files(folder).items()]
        done = api.create_commit(repo_id=repo, operations=operations, commit_message="Published from My First LLM Experiment", repo_type="model")
    except BaseException as error:  # an interrupt as well
        left = _take_back(api, repo) if made else "Nothing was published."
        if isinstance(error, CourseError) or not isinstance(error, Exception):
            raise
        raise CourseError(f"{_says(error, repo)} {left}") from None
    return Plan(repo, private, planned.files, str(done.commit_url))


def _make_place(api, repo: str, private: bool) -> bool:
    """Makes the repository where it isn't there: whether it did. CourseError where it is another's, or not as private as asked."""
    from huggingface_hub.errors import RepositoryNotFoundError

    me = api.whoami()
    mine = {me["name"], *(org["name"] for org in me.get("orgs", []))}
    try:
        found = api.repo_info(repo, repo_type="model")
    except RepositoryNotFoundError:
        found = None
    owner = repo.split("/")[0]
    if owner not in mine:
        there = "is taken" if found else "can't be yours"
        raise CourseError(f"The name {repo} {there}: your token is of {me['name']}. Nothing was published; choose a name that begins with {me['name']}/.")
    if found is None:
        api.create_repo(repo, private=private, repo_type="model", exist_ok=False)
        return True
    if bool(found.private) != private:
        is_, asked = ("private", "public") if found.private else ("public", "private")
        raise CourseError(f"{repo} is there already, and {is_}, where you asked for {asked}. Nothing was published; change it on the Hub, or ask for {is_}.")
    return False


def _take_back(api, repo: str) -> str:
    """Removes the repository that was made a moment ago, unless the commit is in it; what there is now, in a sentence."""
    try:
        if set(api.list_repo_files(repo, repo_type="model")) <= {".gitattributes"}:
            api.delete_repo(repo, repo_type="model", missing_ok=True)
            return "Nothing was published."
        return f"The commit had arrived all the same: look at https://huggingface.co/{repo}."
    except Exception:  # no network, as likely as not the reason for all this
        return f"Nothing was published, but an empty https://huggingface.co/{repo} may be left: remove it there, or run this again."


def _says(error: Exception, repo: str) -> str:
    """What went wrong, in a sentence; never in the error's own words, which may quote a request's headers."""
    chain = [error, error.__cause__, error.__context__]
    if any(getattr(e, "errno", None) in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)) for e in chain):
        return "The disk is full, and the upload needs a little room on it: free some space and run again."
    status = next((e.response.status_code for e in chain if getattr(e, "response", None) is not None), 0)
    kinds = {kind.__name__ for e in chain if e is not None for kind in type(e).__mro__}
    if status == 401:
        return "The Hub doesn't know your token (HTTP 401): make a new one with write access, and set HF_TOKEN."
    if status in (403, 413) and "storage" in str(error).lower():
        return "Your account on the Hub has no room for it: free some there."
    if status == 403:
        return f"Your token may not write to {repo} (HTTP 403): make one with write access to it."
    if status == 409:
        return f"The name {repo} is taken, or somebody wrote to it this very moment (HTTP 409): run again, or choose another name."
    if status == 429 or status >= 500:
        return f"The Hub is busy (HTTP {status}): wait a minute and run again."
    if status:
        return f"The Hub refused it (HTTP {status}): check the name and the card's head, then run again."
    if kinds & {"ConnectError", "ConnectTimeout", "ReadTimeout", "NetworkError", "TransportError", "ConnectionError", "TimeoutError", "OfflineModeIsEnabled"}:
        return "The Hub can't be reached: is there a network (and HF_HUB_OFFLINE unset)? Run again."
    return f"The Hub's client stopped ({type(error).__name__}): run again, and report it if it stays."
