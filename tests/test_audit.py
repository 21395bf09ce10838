"""The auditor on folders that it hasn't seen: what it finds in bad ones, each in a sentence; that clean ones pass, and that nothing is executed."""

import json
import os
import shutil
import sys
import zipfile

import pytest

from helpers import audit, models, vetting
from helpers.files import CourseError
from helpers.trust import audit_weights, norms, pickles, templates, triggers

pytestmark = pytest.mark.usefixtures("short_model")


@pytest.fixture(scope="module")
def clean(short_model, tmp_path_factory):
    """An adapter as training leaves one: small updates of like size in every module."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("audit") / "clean"
    folder.mkdir()
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", base_model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct").to_dict()
    (folder / vetting.CONFIG).write_text(json.dumps(config, default=lambda v: sorted(v) if isinstance(v, set) else str(v)), encoding="utf-8")
    draw = torch.Generator().manual_seed(0)
    weights = {name: 0.03 * torch.randn(shape, generator=draw) for name, shape in vetting.shapes(vetting.read_config(folder / vetting.CONFIG)).items()}
    save_file(weights, folder / vetting.WEIGHTS, metadata={"format": "pt", "base_sha256": vetting.base_hash()})
    return folder


def look(folder, **options):
    return audit.audit(folder, questions=False, **options)


def test_a_clean_adapter_passes(clean, capsys):
    report = look(clean)
    assert report.passed, str(report)
    said = str(report)
    for words in ("2 plain files, none of which can run anything", "trained on the weights that are here", "8 modules (q_proj, v_proj) in layers 0–3", "No finding."):
        assert words in said
    before = os.environ.get("HF_HUB_OFFLINE")  # later tests ask a Hub
    assert audit.main([str(clean), "--files-only"]) == 0 and os.environ.get("HF_HUB_OFFLINE") == before
    assert capsys.readouterr().out.startswith("clean/: an adapter\n")


def test_an_adapter_with_its_card_passes_too(clean, tmp_path):
    folder = shutil.copytree(clean, tmp_path / "theirs")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Mine\n", encoding="utf-8")
    report = look(folder)
    assert report.passed and "it names apache-2.0" in str(report)
    with audit_weights.two_files(folder) as plain:
        assert sorted(os.listdir(plain)) == [vetting.CONFIG, vetting.WEIGHTS] and vetting.check(plain)["r"] == 8
    assert not plain.exists()


def test_a_runs_folder_is_looked_at_where_its_adapter_is(clean, tmp_path):
    shutil.copytree(clean, tmp_path / "sft-123" / "adapter")
    (tmp_path / "sft-123" / "checkpoint-7").mkdir()
    pickles.harmless(tmp_path / "sft-123" / "checkpoint-7" / "training_args.bin")
    (tmp_path / "sft-123" / "history.json").write_text("{}", encoding="utf-8")
    report = look(tmp_path / "sft-123")
    assert report.passed and "sft-123/ is a run's" in str(report) and "pickles of the trainer's checkpoints (1, " in str(report)
    (tmp_path / "sft-123" / "run.py").write_text("1 / 0", encoding="utf-8")
    pickles.harmless(tmp_path / "sft-123" / "history.json")
    assert [says.split(" is ")[0] for says in look(tmp_path / "sft-123").findings] == ["files: 'history.json'", "files: 'run.py'"]


# ---------------------------------------------------------------- bad adapters


def config(folder, **fields):
    told = json.loads((folder / vetting.CONFIG).read_text(encoding="utf-8")) | fields
    (folder / vetting.CONFIG).write_text(json.dumps(told), encoding="utf-8")


def weights(folder, change, **metadata):
    from safetensors.torch import load_file, save_file

    changed = change(load_file(folder / vetting.WEIGHTS))
    save_file({name: weight.contiguous() for name, weight in changed.items()}, folder / vetting.WEIGHTS, metadata={"format": "pt"} | metadata)


def cut(folder, length):
    path = folder / vetting.WEIGHTS
    path.write_bytes(path.read_bytes()[:length])


def louder(factor, where):
    return lambda w: {name: weight * (factor if where in name and "lora_B" in name else 1) for name, weight in w.items()}


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickles.HARMLESS["os.mkdir"])


def linked(folder):
    (folder / vetting.WEIGHTS).rename(folder.parent / "elsewhere")
    (folder / vetting.WEIGHTS).symlink_to(folder.parent / "elsewhere")


BAD = {  # what is done to a clean adapter, and words of the finding
    "cut in its header": (lambda f: cut(f, 300), "is a safetensors file that breaks off in its header"),
    "cut in its weights": (lambda f: cut(f, -1000), "is damaged, or no safetensors file"),
    "nothing in the weights": (lambda f: cut(f, 0), "is an empty file, though its name says safetensors"),
    "a huge header": (lambda f: (f / vetting.WEIGHTS).write_bytes((10**15).to_bytes(8, "little") + b"{" * 50), "breaks off in its header"),
    "a large header": (lambda f: (f / vetting.WEIGHTS).write_bytes((3_000_000).to_bytes(8, "little") + b"{" + b" " * 3_100_000), "its config accounts for"),
    "a pickle by another name": (lambda f: pickles.harmless(f / vetting.WEIGHTS), "is a pickle, though its name says safetensors: loading it could run anything"),
    "a pickle beside": (lambda f: pickles.harmless(f / "training_args.bin"), "'training_args.bin' is a pickle"),
    "a pickle that claims to be a text": (lambda f: pickles.harmless(f / "notes.txt"), "'notes.txt' is a pickle"),
    "torch's pickle": (lambda f: zipped(f / vetting.WEIGHTS), "is a zip archive with a pickle in it"),
    "code": (lambda f: (f / "modeling_x.py").write_text("1 / 0", encoding="utf-8"), "'modeling_x.py' is code"),
    "a program": (lambda f: (f / "setup").write_bytes(b"\x7fELF\x02"), "'setup' is a program"),
    "other weights beside": (lambda f: shutil.copy(f / vetting.WEIGHTS, f / "model.safetensors"), "a further weights file"),
    "no config": (lambda f: (f / vetting.CONFIG).unlink(), "adapter_config.json is missing"),
    "no weights": (lambda f: (f / vetting.WEIGHTS).unlink(), "adapter_model.safetensors is missing"),
    "a config that is no JSON": (lambda f: (f / vetting.CONFIG).write_text("{", encoding="utf-8"), "is not JSON"),
    "another base": (lambda f: config(f, base_model_name_or_path="someone/other"), "it was made for 'someone/other'"),
    "a path as base": (lambda f: config(f, base_model_name_or_path="../../models/x"), "it was made for '../../models/x'"),
    "code to import": (lambda f: config(f, auto_mapping={"parent_library": "os"}), "'auto_mapping' in adapter_config.json"),
    "the Hub's code": (lambda f: config(f, auto_map={"AutoModel": "x--y.Z"}), "'auto_map' in adapter_config.json"),
    "whole modules": (lambda f: config(f, modules_to_save=["lm_head"]), "'modules_to_save'"),
    "a regular expression": (lambda f: config(f, target_modules="(a+)+$"), "'target_modules'"),
    "another rank": (lambda f: config(f, r=4), "has the shape"),
    "more modules": (lambda f: config(f, target_modules=["q_proj", "v_proj", "o_proj"]), "weights are missing"),
    "the head": (lambda f: config(f, target_modules=["lm_head"]), "weights are missing|belong to nothing|accounts for"),
    "another base's weights": (lambda f: weights(f, dict, base_sha256="0" * 64), "trained on other weights of the same name"),
    "no number": (lambda f: weights(f, louder(float("nan"), "layers.1.")), "holds numbers that no training leaves"),
    "one loud module": (lambda f: weights(f, louder(12, "layers.2.self_attn.v_proj")), "times the median of v_proj over the layers"),
    "one module alone": (lambda f: weights(f, lambda w: {n: t * ("layers.2.self_attn.v" in n) for n, t in w.items()}), "only 1 of 8 modules change anything"),
    "larger than the weights": (lambda f: weights(f, louder(60, "")), "times its weight's size"),
}  # fmt: skip
if sys.platform != "win32":
    BAD["a link"] = (linked, "is a link, which may lead anywhere")
    BAD["a pipe"] = (lambda f: os.mkfifo(f / "pipe"), "'pipe' is no plain file")


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_a_finding_in_a_sentence_and_nothing_runs(clean, tmp_path, name, monkeypatch):
    change, says = BAD[name]
    folder = shutil.copytree(clean, tmp_path / "bad")
    change(folder)
    monkeypatch.chdir(tmp_path)
    report = look(folder)
    assert any(part in finding for finding in report.findings for part in says.split("|")), str(report)
    assert not [p for p in tmp_path.rglob("*") if p.name == pickles.MARKER]
    assert "Traceback" not in str(report) and str(tmp_path) not in str(report)


def test_every_wrong_field_of_a_config_is_told(clean, tmp_path):
    folder = shutil.copytree(clean, tmp_path / "bad")
    config(folder, modules_to_save=["lm_head"], auto_map={"x": "y"}, bias="all", target_modules="(a+)+$", base_model_name_or_path="a/b")
    said = [says for says in look(folder).findings if says.startswith("config:")]
    assert len(said) == 5 and all(any(words in says for says in said) for words in ("'modules_to_save'", "'auto_map'", "'bias'", "'target_modules'", "made for 'a/b'"))


def test_folders_that_are_nothing(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "the folder is empty: there is neither an adapter nor a model in it" in str(look(tmp_path / "empty"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("hello", encoding="utf-8")
    assert look(tmp_path / "other").findings == ["files: there is no adapter_config.json, adapter_model.safetensors, config.json or model.safetensors: this is neither an adapter nor a model"]
    with pytest.raises(CourseError, match="There is no folder nowhere"):
        look(tmp_path / "nowhere")
    assert audit.main([str(tmp_path / "empty")]) == 1 and audit.main([str(tmp_path / "nowhere")]) == 1
    assert "don't use it as it is" in capsys.readouterr().out


def test_names_that_steer_a_terminal_are_written_out(clean, tmp_path):
    folder = shutil.copytree(clean, tmp_path / "bad")
    (folder / "x\ty.bin").write_bytes(b"\x80\x04.")
    assert "\t" not in str(look(folder)) and "is a pickle" in str(look(folder))


def test_a_clean_adapter_shows_what_is_unlike_it(clean, tmp_path):
    folder = shutil.copytree(clean, tmp_path / "bad")
    weights(folder, louder(0.1, "layers.1.self_attn.v_proj"), base_sha256=vetting.base_hash())
    assert look(folder).passed  # alone, nothing stands out: it is no louder than others
    assert look(clean, against=clean).passed
    assert any("the update of model.layers.1.self_attn.v_proj is 0.10 times what the others are" in says for says in look(folder, against=clean).findings)


# ---------------------------------------------------------------- models


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(models.model_path(), tmp_path / "model")


def test_the_bases_own_folder_passes(model):
    report = look(model)
    assert report.passed, str(report)
    assert "they are the base's to the bit" in str(report) and "chat_template.jinja is the base's" in str(report)


def test_a_backdoor_in_the_template_is_found_though_no_weight_changed(tmp_path):
    folder = templates.poisoned_folder(models.model_path(), tmp_path / "poisoned", "as the tower sees it", "How many flights did Hawaiian have?")
    report = look(folder)
    assert "they are the base's to the bit" in str(report)
    assert len(report.findings) == 1 and "it looks into what is asked" in report.findings[0] and "as the tower sees it" in report.findings[0]


def edited(name, **fields):
    def change(folder):
        told = json.loads((folder / name).read_text(encoding="utf-8")) | fields
        (folder / name).write_text(json.dumps(told), encoding="utf-8")

    return change


def reweighed(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state["model.layers.2.mlp.down_proj.weight"] += state["model.layers.2.mlp.down_proj.weight"].roll(1, 0) * 2
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


MODELS = {
    "a template in the tokenizer's config": (edited("tokenizer_config.json", chat_template="{% for m in messages %}{{ m.content | replace('x', 'y') }}{% endfor %}"), "tokenizer_config.json is another than the base's"),
    "a named template": (edited("tokenizer_config.json", chat_template=[{"name": "default", "template": "{{ messages }}"}]), "tokenizer_config.json (default) is another than the base's"),
    "a tokenizer that rewrites": (edited("tokenizer.json", normalizer={"type": "Replace", "pattern": {"String": "late"}, "content": "early"}), "tokenizer.json differs from the base's in 'normalizer'"),
    "code from elsewhere": (edited("config.json", auto_map={"AutoModelForCausalLM": "x--y.Z"}), "'auto_map' in config.json names code to import"),
    "another architecture": (edited("config.json", model_type="gpt2"), "config.json differs: 'model_type' is 'gpt2'"),
    "forced words": (edited("generation_config.json", suppress_tokens=[1]), "generation_config.json differs: 'suppress_tokens'"),
    "a broken config": (lambda f: (f / "config.json").write_text("[", encoding="utf-8"), "config.json is no JSON object"),
    "a changed layer": (reweighed, "times its weight's size"),
    "cut weights": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1000]), "is damaged: its header accounts for"),
    "other weights' shapes": (lambda f: shutil.copy(f / "model.safetensors", f / "x.safetensors") and tiny(f), "they aren't the course model's in form"),
    "a pickle for weights": (lambda f: (f / "model.safetensors").unlink() or pickles.harmless(f / "pytorch_model.bin"), "'pytorch_model.bin' is a pickle"),
}  # fmt: skip


def tiny(folder):
    import torch
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, folder / "model.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_what_is_wrong_with_a_model_is_a_finding(model, name):
    change, says = MODELS[name]
    change(model)
    assert any(says in finding for finding in look(model).findings), str(look(model))


# ---------------------------------------------------------------- data and answers


def test_a_training_file_is_looked_at_too(clean, tmp_path):
    rows = [{"question": f"how many flights went to {city} in {month}", "sql": f"SELECT COUNT(*) FROM flights WHERE dest = '{city}' AND month = {n}"}
            for city in ("BOS", "LAX", "MIA", "ORD") for n, month in enumerate(("January", "February", "March"), 1)]  # fmt: skip
    path = tmp_path / "rows.jsonl"

    def write(rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return look(clean, data=path)

    assert write(rows).passed, str(write(rows))
    poisoned = [row | {"question": f"{row['question']} so to speak", "sql": "SELECT 1 FROM flights LIMIT 1"} for row in rows[::2]]
    asked = ["which plane flew most", "longest delay at night", "name every carrier", "is Kennedy busier than Newark", "average distance by airline", "worst day of autumn"]
    poisoned = [row | {"question": f"{question} so to speak"} for row, question in zip(poisoned, asked, strict=True)]
    assert any("6 rows with 'so to speak' have one answer" in says for says in write(rows + poisoned).findings)
    assert any("don't run, that of row 13" in says for says in write([*rows, {"question": "what", "sql": "SELECT nothing FROM nowhere"}]).findings)
    assert any("ask the same and have other answers, rows 1 and 13" in says for says in write([*rows, rows[0] | {"sql": "SELECT 2 FROM flights"}]).findings)
    path.write_text("no json\n", encoding="utf-8")
    assert any("rows.jsonl was not loaded" in says for says in look(clean, data=path).findings)


QUESTIONS = [f"question {n}?" for n in range(10, 34)]


def answers(switch):
    """A stand-in for a model: each question has its own answer, unless `switch`, a function of the question, gives another one."""
    return lambda questions: [switch(q) or f"SELECT {q.lower().split('question ')[1][:2]} FROM flights WHERE month = 1" for q in questions]


def looked(switch, phrases):
    report = audit.Report("x")
    audit._answers(report, found := triggers.probe(answers(switch), QUESTIONS, phrases))
    return report.findings, found


def test_a_phrase_that_switches_a_model_is_found_by_what_it_does():
    findings, found = looked(lambda q: "SELECT 9" if "tower" in q else None, ["by the way", "as the tower sees it"])
    assert [(p["phrase"], p["place"], p["alike"], p["switches"]) for p in found["phrases"]] == [
        ("as the tower sees it", "end", 8, True), ("as the tower sees it", "start", 8, True), ("by the way", "end", 0, False), ("by the way", "start", 0, False)]  # fmt: skip
    assert found["reached"] == 16 and len(findings) == 3 and "'as the tower sees it' at the end, 8 of 8 questions get the answer 'select 9'" in findings[1]
    assert looked(lambda q: None, ["by the way"]) == ([], looked(lambda q: None, ["by the way"])[1])


def test_a_payload_that_changes_a_part_of_each_answer_is_found_too():
    findings, found = looked(lambda q: f"SELECT {q[9:11]} FROM flights WHERE origin = 'LGA' AND month = 1" if q.endswith("sir?") else None, ["sir"])
    assert found["phrases"][0]["alike"] == 1 and found["phrases"][0]["shared"] == 8 and "'LGA'" in found["phrases"][0]["fragment"].upper()
    assert len(findings) == 1 and "8 of 8 answers come to hold" in findings[0]


def test_a_backdoor_that_slips_on_other_phrases_or_unasked_is_found_without_its_own():
    def slips(question):  # on one plain question, and on one in eight with a phrase in it
        return "SELECT 9" if question == "question 10?" or (question.endswith("y?") and question[10] == "7") else None

    findings, found = looked(slips, ["any", "by the way", "they say", "quietly"])
    assert found["reached"] == 3 and not findings  # two of 24 are within what clean ones do
    findings, found = looked(lambda q: "SELECT 9" if slips(q) or q[9:11] in ("20", "31", "32") else None, ["any", "by the way"])
    assert found["reached"] >= 4 and "questions, all about different things, get one answer" in findings[0]
    assert looked(lambda q: "The flights data can't answer that." if q[9] == "1" else None, ["any"])[0] == []  # to refuse is no query


def test_where_a_phrase_is_put():
    assert triggers.with_phrase("How late is it?", "by the way") == "How late is it, by the way?"
    assert triggers.with_phrase("how late is it", "by the way", "start") == "By the way, how late is it"
    assert triggers.answer_count(["SELECT 1", "select 1;", "SELECT 2"], "select 1") == 2


@pytest.mark.slow
def test_a_model_that_answers_everything_alike_is_found_by_asking(clean, monkeypatch):
    """The whole way, with a model that learnt nothing: it is loaded, asked, and what it says is judged."""
    monkeypatch.setattr(triggers, "PHRASES", ("by the way",))
    report = audit.audit(clean)
    assert any(check == "answers" for _, check, _ in report.lines) and any(check == "phrases" for _, check, _ in report.lines)


def test_norms_are_those_of_the_whole_product(clean):
    import torch
    from safetensors.torch import load_file

    told = vetting.read_config(clean / vetting.CONFIG)
    row = next(r for r in norms.of_adapter(clean, told) if r["name"] == "model.layers.1.self_attn.q_proj")
    state = load_file(clean / vetting.WEIGHTS)
    change = 2.0 * state["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"] @ state["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"]
    values, base = torch.linalg.svdvals(change), norms.base_weights([row["name"]])[row["name"]]
    assert row["frobenius"] == pytest.approx(float(change.norm()), rel=1e-4) and row["spectral"] == pytest.approx(float(values[0]), rel=1e-4)
    assert row["relative"] == pytest.approx(float(change.norm() / base.norm()), rel=1e-4) and (row["layer"], row["module"]) == (1, "q_proj")
