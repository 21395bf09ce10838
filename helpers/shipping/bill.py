"""A bill of materials for an exported model, in CycloneDX's form: base, data, chat template, libraries, each file's hash, and who comes from whom.

Made with cyclonedx-python-lib, and validated against the official schema that it carries; `modelCard`, which the library can't write
yet, is added to its JSON. The same folder gives the same bytes: no time stands in it, and its serial number is drawn from its content.
"""

import hashlib
import json
import uuid
from pathlib import Path

from helpers.files import CourseError, write_whole
from helpers.menu import choose
from helpers.models import model_path
from helpers.shipping import lineage, parcel
from helpers.shipping.card import ADAPTER, LIMITS, SETTINGS, USE, check_run, own_rows
from helpers.shipping.energy import Used

VERSION = "1.6"
MISSING = 'A bill is made with cyclonedx-python-lib, which isn\'t installed here: pip install -c constraints.txt -e ".[ship]"'
TEMPLATES = ("chat_template.jinja", "tokenizer_config.json")  # where a folder may have its own; the first counts where both do
UNLISTED = (parcel.BILL, parcel.SIGNATURE)  # a bill can't hold its own hash, and the signature is made after it


def template_of(folder: Path) -> str | None:
    """The chat template that a folder's own tokenizer writes prompts by; None where it has none, as an adapter's."""
    folder = Path(folder)
    if (folder / TEMPLATES[0]).is_file():
        return (folder / TEMPLATES[0]).read_text(encoding="utf-8", errors="replace")
    try:
        template = json.loads((folder / TEMPLATES[1]).read_text(encoding="utf-8")).get("chat_template")
        return template if isinstance(template, str) or template is None else json.dumps(template, sort_keys=True)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, RecursionError):
        raise CourseError(f"{TEMPLATES[1]} in {folder.name}/ can't be read: export the model again.") from None


def hash_template(template: str) -> str:
    """sha256 of a chat template's text."""
    return hashlib.sha256(template.encode("utf-8")).hexdigest()


def make(folder: Path, name: str, rows: list[dict], stage: str = "sft", seed: int = 0, energy: Used | None = None,
         training: dict | None = None, data: tuple[str, ...] | None = None) -> dict:  # fmt: skip
    """The bill of the exported model in a folder, as CycloneDX's JSON. Arguments as those of `card.make`.

    CourseError where the library is missing, or the schema refuses what was made.
    """
    try:
        from cyclonedx.model.bom import Bom
        from cyclonedx.output.json import JsonV1Dot6
    except ImportError:
        raise CourseError(MISSING) from None
    check_run(training, stage, seed)
    listed, data = parcel.hashes(folder, UNLISTED), data or lineage.trained_on(stage)
    whole = "config.json" in listed
    template = template_of(folder) or template_of(model_path(choose().name)) or ""  # an adapter's prompts are written by its base's
    parts = _parts(listed, name, whole, data, hash_template(template))
    bom = Bom(components=[part for ref, part in parts.items() if ref != "model"])
    bom.metadata.component = parts["model"]
    bom.register_dependency(parts["model"], [part for ref, part in parts.items() if not ref.startswith(("model", "file:"))])
    bill = json.loads(JsonV1Dot6(bom).output_as_string())
    del bill["metadata"]["timestamp"]
    bill["metadata"]["component"]["modelCard"] = _model_card(own_rows(rows, stage, seed), stage, data, energy, training)
    parent = next(part for part in bill["components"] if part["bom-ref"] == "base")
    bill["metadata"]["component"]["pedigree"] = {"ancestors": [{key: value for key, value in parent.items() if key != "bom-ref"}]}  # a reference stands once
    bill["serialNumber"] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(bill | {'serialNumber': ''}, sort_keys=True))}"
    if found := invalid(bill):
        raise CourseError(f"The bill was not made: CycloneDX's schema refuses it ({found}). Please report it.")
    return bill


def write(folder: Path, bill: dict) -> Path:
    """Writes a bill into its folder, in the form that equal content gives equal bytes."""
    target = Path(folder) / parcel.BILL
    write_whole(target, json.dumps(bill, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    return target


def invalid(bill: dict) -> str | None:
    """What CycloneDX's official schema of the bill's version says against it, in its own words; None where it is valid."""
    try:
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator

        version = SchemaVersion.from_version(str(bill.get("specVersion")))
        found = JsonStrictValidator(version).validate_str(json.dumps(bill))
    except ImportError:
        raise CourseError(MISSING) from None
    except ValueError:
        return f"specVersion {bill.get('specVersion')!r} is none of CycloneDX"
    return None if found is None else str(getattr(found.data, "message", found))[:300]


def read(folder: Path) -> dict:
    """The bill in a folder. CourseError where there is none, or none that can be read."""
    path = Path(folder) / parcel.BILL
    try:
        bill = json.loads(path.read_text(encoding="utf-8"))
        if bill["bomFormat"] == "CycloneDX" and isinstance(bill["components"], list):
            return bill
    except FileNotFoundError:
        raise CourseError(f"{Path(folder).name}/ has no bill of materials ({parcel.BILL}): ask for one, or make it with bill.make().") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CourseError(f"{parcel.BILL} in {Path(folder).name}/ is no bill that can be read: take the folder from its source again.")


def verify(folder: Path, tokenizer=None) -> list[str]:
    """What differs between a folder and its bill, a sentence each; [] where every file is as it says.

    tokenizer: whose chat template is compared too, the one that will write the prompts (an adapter's folder has none of its own).
    That the bill itself is the maker's, only a signature tells.
    """
    bill = read(folder)
    try:
        parts = {part["bom-ref"]: {h["alg"]: h["content"] for h in part.get("hashes", [])} for part in bill["components"]}
        named = {ref.removeprefix("file:"): known["SHA-256"] for ref, known in parts.items() if ref.startswith("file:")}
        wanted = parts["template"]["SHA-256"]
    except (KeyError, TypeError, AttributeError):
        raise CourseError(f"{parcel.BILL} in {Path(folder).name}/ isn't one of the course's: its files or its chat template have no hash.") from None
    problems = parcel.compared(named, parcel.hashes(folder, UNLISTED), "the bill")
    used = template_of(folder)
    if used is not None and hash_template(used) != wanted and not any("chat_template" in problem for problem in problems):
        problems.append("The chat template in tokenizer_config.json was changed: prompts would be written in another form than the model was trained on.")
    spoken = getattr(tokenizer, "chat_template", None)  # a text, or several by name
    if tokenizer is not None and hash_template((spoken.get("default") if isinstance(spoken, dict) else spoken) or "") != wanted:
        problems.append("The tokenizer here writes prompts by another chat template than the bill names: the model was trained on another form.")
    return problems


# ---------------------------------------------------------------- parts


def _parts(listed: dict[str, str], name: str, whole: bool, data: tuple[str, ...], template: str) -> dict:
    """CycloneDX components by reference: the model itself, what it is made of, and its files."""
    from cyclonedx.factory.license import LicenseFactory
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    kinds, licences = ComponentType, LicenseFactory()

    def part(ref, kind, name, digest=None, licence=None, purl=None, **more):
        hashes = [HashType(alg=HashAlgorithm.SHA_256, content=digest)] if digest else []
        given = [licences.make_from_string(licence)] if licence else []
        purl = PackageURL.from_string(purl) if purl else None
        return Component(type=kind, name=name, bom_ref=ref, hashes=hashes, licenses=given, purl=purl, **more)

    under = lineage.base()
    known = {"course:weights": under.what, "course:wheel": under.wheel, "course:wheel_sha256": under.wheel_sha256}
    found = {
        "model": part("model", kinds.MACHINE_LEARNING_MODEL, name, licence=lineage.licence(), description="merged model" if whole else "adapter (LoRA or another of PEFT's)"),
        "base": part(
            "base", kinds.MACHINE_LEARNING_MODEL, under.repo, under.weights_sha256, under.licence, f"pkg:huggingface/{under.repo}" + (f"@{under.revision}" if under.revision else ""),
            properties=[Property(name=key, value=value) for key, value in known.items() if value],
        ),
        "template": part("template", kinds.DATA, "chat template", template, description="the form in which prompts are written for the model"),
    }  # fmt: skip
    found |= {f"data:{d.name}": part(f"data:{d.name}", kinds.DATA, d.name, d.sha256, d.licence, description=d.size) for d in lineage.data_sets(data)}
    found |= {f"library:{one.name}": part(f"library:{one.name}", kinds.LIBRARY, one.name, None, one.licence, one.purl, version=one.version) for one in lineage.libraries()}
    return found | {f"file:{file}": part(f"file:{file}", kinds.FILE, file, digest) for file, digest in listed.items()}


def _model_card(rows: list[dict], stage: str, data: tuple[str, ...], energy: Used | None, training: dict | None) -> dict:
    """CycloneDX's `modelCard`: task, data, metrics with intervals, settings, limits, energy."""
    metrics = [
        {"type": "execution accuracy", "value": f"{row['accuracy']:.4f}", "slice": f"{row['split']}, n = {row['n']}, seed {row['seed']}, {row['source']}",
         "confidenceInterval": {"lowerBound": f"{row['low']:.4f}", "upperBound": f"{row['high']:.4f}"}}
        for row in rows
    ]  # fmt: skip
    card = {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "text-to-SQL",
            "architectureFamily": "transformer",
            "modelArchitecture": choose().shape["model_type"],
            "datasets": [{"ref": f"data:{name}"} for name in sorted(data)],
            "inputs": [{"format": "a question in English"}],
            "outputs": [{"format": "a SQLite query"}],
        },
        "considerations": {"useCases": [_line(USE)], "technicalLimitations": [line.removeprefix("- ") for line in LIMITS.splitlines()]},
        "properties": [{"name": "course:stage", "value": stage}],
    }
    if metrics:
        card["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    settings = {"method": (training or {}).get("method")} | (training or {}).get("settings", {})
    settings = {key: settings.get(key) for key in SETTINGS} | {key: (training or {}).get("adapter", {}).get(key) for key in ADAPTER}
    settings |= {f"data_{key}": value for key, value in (training or {}).get("data", {}).items()}
    card["properties"] += [{"name": f"training:{key}", "value": json.dumps(value)} for key, value in sorted(settings.items()) if value is not None]
    if energy:
        cost = {"value": round(energy.kwh, 7), "unit": "kWh"}
        provider = {"organization": {"name": "unknown"}, "energySource": "unknown", "energyProvided": cost, "description": energy.grid}
        consumption = {"activity": "fine-tuning", "energyProviders": [provider], "activityEnergyCost": cost}
        consumption["co2CostEquivalent"] = {"value": round(energy.grams / 1e6, 10), "unit": "tCO2eq"}
        consumption["properties"] = [{"name": "course:how", "value": energy.how}, *({"name": "course:leaves_out", "value": what} for what in energy.leaves_out)]
        card["considerations"]["environmentalConsiderations"] = {"energyConsumptions": [consumption]}
    return card


def _line(text: str) -> str:
    return " ".join(text.split())
