"""The table of what strangers hand the course: made of the recorded tries, one for each input of the tests, all as they should be."""

import json

import test_jsonl
import test_kit
import test_vetting

from benchmarks import strangers


def test_the_table_is_of_the_tests_inputs_and_every_one_ends_as_it_should():
    record = json.loads(strangers.RECORD.read_text(encoding="utf-8"))
    tried = {kind: sum(counts.values()) for kind, counts in record["now"].items()}
    assert tried["bad JSON Lines"] == len(test_jsonl.REFUSED) and tried["bad manifests of a kit"] == len(test_kit.MANIFESTS)
    assert tried["bad adapters"] == len(test_vetting.CONFIGS) + len(test_vetting.WEIGHTS) + len(test_vetting.FOLDERS) >= 40
    assert {kind: set(counts) for kind, counts in record["now"].items()} == {kind: {wanted} for kind, wanted in strangers.KINDS.items()}
    assert strangers.TABLE.read_text(encoding="utf-8") == strangers.table(record), "python benchmarks/strangers.py now"


def test_an_outcome_is_told_by_what_a_process_says():
    assert strangers.outcome("hung", "") == "hung"
    assert strangers.outcome("1", "Traceback (most recent call last)") == "traceback"
    assert strangers.outcome("0", "SAID \x1b[2J") == "raw escapes"
    assert strangers.outcome("0", "SAID 'x'") == "one sentence"
    assert strangers.outcome("0", "READ 2") == "taken in silence"
