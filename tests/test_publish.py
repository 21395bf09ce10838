"""Publishing: dry by default, whole or not at all, the token never shown; and what a folder must not hold to be given away."""

import errno
import os
from types import SimpleNamespace

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from helpers import hub
from helpers.files import CourseError
from helpers.shipping import parcel, publish

TOKEN = "hf_" + "s" * 34


def refused(kind, status, says=""):
    """An error as huggingface_hub raises it, with the token in what it says, as a request's headers would have it."""
    response = httpx.Response(status, request=httpx.Request("POST", "https://huggingface.co/api", headers={"authorization": f"Bearer {TOKEN}"}))
    return kind(f"{status} {says} {TOKEN}", response=response)


class Hub:
    """In place of HfApi: repositories {name: (private, files)}, and what is to fail: {method: error}."""

    def __init__(self):
        self.repos, self.fails, self.calls = {}, {}, []

    def __call__(self, token):
        assert token == TOKEN
        return self

    def __getattr__(self, name):
        def call(*args, **more):
            self.calls.append(name)
            if name in self.fails:
                raise self.fails[name]
            return getattr(self, f"_{name}")(*args, **more)

        return call

    def _whoami(self):
        return {"name": "ada", "orgs": [{"name": "lovelace"}]}

    def _repo_info(self, repo, repo_type):
        if repo not in self.repos:
            raise refused(errors.RepositoryNotFoundError, 404)
        return SimpleNamespace(private=self.repos[repo][0])

    def _create_repo(self, repo, private, repo_type, exist_ok):
        assert repo not in self.repos and not exist_ok
        self.repos[repo] = (private, [".gitattributes"])

    def _create_commit(self, repo_id, operations, commit_message, repo_type):
        self.repos[repo_id][1].extend(o.path_in_repo for o in operations)
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")

    def _list_repo_files(self, repo, repo_type):
        return self.repos[repo][1]

    def _delete_repo(self, repo, repo_type, missing_ok):
        del self.repos[repo]


@pytest.fixture
def there(monkeypatch):
    stub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", stub)
    monkeypatch.setattr(hub, "token", lambda: TOKEN)
    return stub


@pytest.fixture
def folder(exported):
    (exported / "README.md").write_text("# flights-sql\n", encoding="utf-8")
    return exported


FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_a_dry_run_tells_what_would_go_where_and_asks_nobody(folder, there, monkeypatch):
    monkeypatch.setattr(hub, "token", lambda: pytest.fail("asked for a token"))
    planned = publish.push(folder, "ada/flights-sql")
    assert there.calls == [] and planned.published is None and list(planned.table()["file"]) == FILES
    assert str(planned).startswith("3 files, 0.0 MB, to https://huggingface.co/ada/flights-sql (private: you alone see it); a dry run")
    assert planned.total == sum((folder / name).stat().st_size for name in FILES)
    assert "(PUBLIC: everybody sees it" in str(publish.plan(folder, "ada/flights-sql", private=False))


@pytest.mark.parametrize("private", [True, False])
def test_everything_goes_in_one_commit(folder, there, private):
    (folder / ".gitattributes").write_text("x", encoding="utf-8")  # the Hub's own: left to it
    done = publish.push(folder, "lovelace/flights-sql", private=private, dry_run=False)
    assert there.calls == ["whoami", "repo_info", "create_repo", "create_commit"]
    assert there.repos == {"lovelace/flights-sql": (private, [".gitattributes", *FILES])}
    assert done.published == "https://huggingface.co/lovelace/flights-sql/commit/1" and TOKEN not in str(done)


def test_what_is_yours_already_gets_a_commit_and_stays_as_private_as_it_is(folder, there):
    there.repos["ada/flights-sql"] = (True, ["old.txt"])
    publish.push(folder, "ada/flights-sql", dry_run=False)
    assert there.repos["ada/flights-sql"] == (True, ["old.txt", *FILES]) and "create_repo" not in there.calls
    with pytest.raises(CourseError, match="is there already, and private, where you asked for public. Nothing was published"):
        publish.push(folder, "ada/flights-sql", private=False, dry_run=False)
    there.fails["create_commit"] = refused(errors.HfHubHTTPError, 500)
    with pytest.raises(CourseError, match="busy"):
        publish.push(folder, "ada/flights-sql", dry_run=False)
    assert "ada/flights-sql" in there.repos and "delete_repo" not in there.calls  # never somebody's own


FAILURES = {  # what fails, with what; and what is said
    "a wrong token": ("whoami", refused(errors.HfHubHTTPError, 401), "doesn't know your token"),
    "a token to read": ("create_repo", refused(errors.HfHubHTTPError, 403), "may not write to ada/flights-sql"),
    "taken meanwhile": ("create_repo", refused(errors.HfHubHTTPError, 409), "is taken, or somebody wrote"),
    "no room there": ("create_commit", refused(errors.HfHubHTTPError, 403, "Private repository storage limit reached"), "has no room"),
    "a busy hub": ("create_commit", refused(errors.HfHubHTTPError, 503), "busy"),
    "a bad card": ("create_commit", refused(errors.BadRequestError, 400), "refused it"),
    "no network": ("whoami", httpx.ConnectError(f"no route {TOKEN}"), "can't be reached"),
    "offline": ("whoami", errors.OfflineModeIsEnabled("offline"), "can't be reached"),
    "cut off": ("create_commit", httpx.ReadTimeout("timed out"), "can't be reached"),
    "a full disk": ("create_commit", OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
    "anything": ("create_commit", RuntimeError(f"odd {TOKEN}"), "stopped (RuntimeError)"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_each_failure_is_one_sentence_and_leaves_nothing_there(folder, there, what, capsys):
    method, error, says = FAILURES[what]
    there.fails[method] = error
    with pytest.raises(CourseError) as told:
        publish.push(folder, "ada/flights-sql", dry_run=False)
    assert says in str(told.value) and str(told.value).endswith("Nothing was published.")
    assert TOKEN not in str(told.value) and told.value.__cause__ is None and there.repos == {}
    assert TOKEN not in "".join(capsys.readouterr())


def test_an_interrupt_takes_back_what_was_begun(folder, there):
    there.fails["create_commit"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        publish.push(folder, "ada/flights-sql", dry_run=False)
    assert there.repos == {}


def test_what_could_not_be_taken_back_and_what_arrived_all_the_same_are_told(folder, there, monkeypatch):
    there.fails |= {"create_commit": httpx.ReadTimeout("x"), "delete_repo": httpx.ConnectError("x")}
    with pytest.raises(CourseError, match="Nothing was published, but an empty https://huggingface.co/ada/flights-sql may be left"):
        publish.push(folder, "ada/flights-sql", dry_run=False)

    def late(**more):
        there._create_commit(**more)
        raise httpx.ReadTimeout("x")

    there.repos.clear()
    monkeypatch.setattr(there, "create_commit", late, raising=False)
    with pytest.raises(CourseError, match="The commit had arrived all the same"):
        publish.push(folder, "ada/flights-sql", dry_run=False)
    assert "README.md" in there.repos["ada/flights-sql"][1]


@pytest.mark.parametrize(("repo", "says"), [("grace/flights-sql", "is taken: your token is of ada"), ("grace/new", "can't be yours: your token is of ada")])
def test_a_name_of_somebody_elses_is_refused(folder, there, repo, says):
    there.repos["grace/flights-sql"] = (False, ["theirs"])
    with pytest.raises(CourseError, match=says):
        publish.push(folder, repo, dry_run=False)
    assert there.repos == {"grace/flights-sql": (False, ["theirs"])}


def test_without_a_token_nothing_is_asked(folder, there, monkeypatch):
    monkeypatch.setattr(hub, "token", lambda: None)
    with pytest.raises(CourseError, match="There is no token, so nothing was sent"):
        publish.push(folder, "ada/flights-sql", dry_run=False)
    assert there.calls == []


@pytest.mark.parametrize("repo", ["flights-sql", "", None, "ada/", "ada/x/y", "ada/my model", "../x", "ada/x.git", "ada/x--y"])
def test_a_place_must_be_owner_and_name(folder, repo):
    with pytest.raises(CourseError, match="as owner/name"):
        publish.plan(folder, repo)


def test_a_folder_without_card_or_weights_is_refused(exported):
    with pytest.raises(CourseError, match="has no model card"):
        publish.plan(exported, "ada/x")
    (exported / "adapter_model.safetensors").unlink()
    with pytest.raises(CourseError, match="has no weights"):
        publish.plan(exported, "ada/x")


# ---------------------------------------------------------------- what must not be given away


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("training_args.bin", b"x", "training_args.bin is a pickle"),
        ("weights.safetensors.old", b"\x80\x04\x95rest", "weights.safetensors.old is a pickle"),
        ("model.dat", b"PK\x03\x04rest", "model.dat is a pickle"),
        ("modeling_x.py", b"import os", "modeling_x.py is code"),
        ("config.json", b'{\n"_name_or_path": "/home/ada/models/x"}', "config.json, line 2, holds a path of a machine"),
        ("config.json", rb'{"a": "C:\\Users\\ada\\x"}', "config.json, line 1, holds a path"),
        ("config.json", b'{"a": "file:///Users/ada/x"}', "config.json, line 1, holds a path"),
        ("notes.md", b"see\n" + TOKEN.encode(), "notes.md, line 2, holds what looks like a token of the Hugging Face Hub"),
        ("c.json", b'{"key": "sk-proj-abcdefghij0123456789"}', "c.json, line 1, holds what looks like a key of a hosted model"),
        ("a/b.yaml", b"key: AKIAABCDEFGHIJKLMNOP", "a/b.yaml, line 1, holds what looks like a key of a cloud"),
        ("k.pem", b"-----BEGIN EC PRIVATE KEY-----", "k.pem, line 1, holds what looks like a private key"),
        ("other.safetensors", (40).to_bytes(8, "little") + b'{"__metadata__":{"from":"/root/runs/x"}}', "other.safetensors, line 1, holds a path"),
    ],
)
def test_a_pickle_a_path_or_a_token_is_refused_and_never_shown(folder, name, content, says):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    with pytest.raises(CourseError, match="flights-sql/ was not taken: ") as error:
        publish.plan(folder, "ada/x")
    assert says in str(error.value) and TOKEN not in str(error.value) and "ada" not in str(error.value)


def test_ordinary_text_is_no_path_and_no_token(folder):
    text = 'See https://example.org/home/x, a/tmp/b, ./runs/sft, "/", "Question:\\n", hf_hub_download, sk-learn, multi-task-specific-fine-tuning-methods, /usr/bin, HuggingFaceTB/SmolLM2.'
    (folder / "notes.md").write_text(text, encoding="utf-8")
    assert parcel.problems(folder) == []


def test_your_own_token_is_found_whatever_its_form(folder, there, monkeypatch):
    monkeypatch.setattr(hub, "token", lambda: "an-odd-token")
    (folder / "notes.md").write_text("use an-odd-token", encoding="utf-8")
    with pytest.raises(CourseError, match="Your own token stands in a file") as error:
        publish.push(folder, "ada/flights-sql", dry_run=False)
    assert "an-odd-token" not in str(error.value) and there.calls == []


def test_an_empty_a_missing_and_an_endless_folder_are_told(tmp_path, monkeypatch):
    with pytest.raises(CourseError, match="There is no folder nowhere"):
        parcel.files(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CourseError, match="empty/ is empty"):
        parcel.files(tmp_path / "empty")
    monkeypatch.setattr(parcel, "MOST", 2)
    for name in "abc":
        (tmp_path / "empty" / name).touch()
    with pytest.raises(CourseError, match="more than 2 files"):
        parcel.files(tmp_path / "empty")


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_to_a_folder_is_no_plain_file(folder, tmp_path):
    (folder / "more").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(CourseError, match="more in flights-sql/ is no plain file"):
        publish.plan(folder, "ada/x")


def test_more_than_three_problems_are_counted(folder):
    for name in ("a.pkl", "b.pkl", "c.pkl", "d.pkl"):
        (folder / name).touch()
    with pytest.raises(CourseError, match="c.pkl is a pickle.* And 1 more."):
        parcel.check(folder)


def test_the_stand_in_is_called_as_the_real_client_takes_it():
    import inspect

    for name in ("whoami", "repo_info", "create_repo", "create_commit", "list_repo_files", "delete_repo"):
        ours = set(inspect.signature(getattr(Hub, f"_{name}")).parameters) - {"self", "repo"}
        real = inspect.signature(getattr(huggingface_hub.hf_api.HfApi, name)).parameters
        assert ours <= set(real) and (name == "whoami" or list(real)[1] == "repo_id"), name
    assert {"path_in_repo", "path_or_fileobj"} <= set(inspect.signature(huggingface_hub.CommitOperationAdd).parameters)
