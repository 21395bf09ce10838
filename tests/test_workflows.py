"""The workflows of .github: pinned actions, least permissions, no stranger's code on the GPU, and the same make targets as a person's."""

import re

import pytest
import yaml

from helpers.runtime import ROOT

FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1].split())
WITHOUT_MAKE = {"Say that nothing ran", "Open an issue, or comment on the open one"}  # the steps that run something else
FROM_STRANGERS = {"pull_request", "pull_request_target", "workflow_run", "issue_comment", "issues"}  # events that anybody can cause
READ_ONLY = ({}, {"contents": "read"})
MAY_WRITE = {("weekly.yml", "issue"): {"actions": "read", "issues": "write"}}


def notice(jobs: dict) -> bool:
    """Does a job say, where no GPU runner is configured, that nothing ran: as a notice and in the run's summary?"""
    runs = [str(job["steps"][0]) for job in jobs.values() if job.get("if") == "vars.GPU_RUNNER == ''"]
    return any(all(word in run for word in ("::notice", "GITHUB_STEP_SUMMARY", "no GPU runner is configured")) for run in runs)


def problems(file: str, text: str) -> set[str]:
    """What is wrong with a workflow, one word or two each."""
    workflow = yaml.safe_load(text)
    events, jobs, found = workflow[True], workflow["jobs"], set()  # YAML reads the key `on` as true
    if not all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use) for use in re.findall(r"\buses:\s*(.*)", text)):
        found.add("not pinned")
    if workflow.get("permissions") not in READ_ONLY:
        found.add("permissions")
    if "pull_request_target" in events:
        found.add("pull_request_target")
    if not {"group", "cancel-in-progress"} <= workflow.get("concurrency", {}).keys():
        found.add("concurrency")
    if len({tuple(event["paths"]) for event in events.values() if isinstance(event, dict) and "paths" in event}) > 1:
        found.add("paths differ")
    for name, job in jobs.items():
        steps = job["steps"]
        if job.get("permissions") not in (*READ_ONLY, MAY_WRITE.get((file, name), {})):
            found.add("permissions")
        if "timeout-minutes" not in job:
            found.add("no timeout")
        machines = job["strategy"]["matrix"]["os"] if job["runs-on"] == "${{ matrix.os }}" else [job["runs-on"]]
        if set(events) & FROM_STRANGERS and not all(re.fullmatch(r"(ubuntu|macos|windows)-[\d.]+", machine) for machine in machines):
            found.add("strangers on our runner")
        if "vars." in job["runs-on"] and (job.get("if"), notice(jobs)) != ("vars.GPU_RUNNER != ''", True):
            found.add("skipped in silence")
        for step in steps:
            given = step.get("with", {})
            if "checkout@" in step.get("uses", "") and given.get("persist-credentials") is not False:
                found.add("credentials")
            if "constraints.txt" not in given.get("key", "constraints.txt") or ("cache" in given) != ("cache-dependency-path" in given):
                found.add("cache")
            if "${{" in step.get("run", ""):
                found.add("expression in a script")
            made = re.fullmatch(r"make ([\w-]+)", step.get("run", "").strip())
            if "run" in step and step.get("name") not in WITHOUT_MAKE and not (made and made[1] in TARGETS):
                found.add("not a make target")
        if not any(step.get("run", "").startswith("make ") or step.get("name") in WITHOUT_MAKE for step in steps):
            found.add("nothing made")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_workflow(path):
    assert not problems(path.name, path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "file, old, new, problem",
    [
        ("ci.yml", r"checkout@\w{40} # v[\d.]+", "checkout@v7", "not pinned"),
        ("ci.yml", r"(checkout@\w{40}) # v[\d.]+", r"\1", "not pinned"),
        ("ci.yml", r"(checkout@\w{39})\w", r"\1", "not pinned"),
        ("ci.yml", r"^permissions: {}", "permissions: write-all", "permissions"),
        ("ci.yml", r"^permissions: {}", "", "permissions"),
        ("ci.yml", r"contents: read", "contents: write", "permissions"),
        ("weekly.yml", r"contents: read", "issues: write", "permissions"),
        ("weekly.yml", r"issues: write", "issues: write\n      contents: write", "permissions"),
        ("ci.yml", r"^  pull_request:", "  pull_request_target:", "pull_request_target"),
        ("ci.yml", r"^  cancel-in-progress:.*", "", "concurrency"),
        ("ci.yml", r"^    timeout-minutes:.*", "", "no timeout"),
        ("gpu.yml", r"^on:", "on:\n  pull_request:", "strangers on our runner"),
        ("gpu.yml", r"^on:", "on:\n  issue_comment:", "strangers on our runner"),
        ("ci.yml", r"runs-on: ubuntu.*", "runs-on: ${{ vars.GPU_RUNNER }}", "strangers on our runner"),
        ("ci.yml", r"os: \[", "os: [gpu, ", "strangers on our runner"),
        ("gpu.yml", r"^    if: vars.GPU_RUNNER != ''", "", "skipped in silence"),
        ("gpu.yml", r"::notice", "::debug", "skipped in silence"),
        ("gpu.yml", r">> .*SUMMARY.*", "", "skipped in silence"),
        ("ci.yml", r"hashFiles\(.*?\)", "github.run_id", "cache"),
        ("ci.yml", r"^ *cache-dependency-path:.*", "", "cache"),
        ("colab.yml", r"^ *- course/hosted.py", "", "paths differ"),
        ("ci.yml", r"persist-credentials: false", "persist-credentials: true", "credentials"),
        ("ci.yml", r"persist-credentials: false", "fetch-depth: 1", "credentials"),
        ("gpu.yml", r"\$MESSAGE", "${{ github.ref_name }}", "expression in a script"),
        ("ci.yml", r"run: make test-unit", "run: make tset-unit", "not a make target"),
        ("ci.yml", r"run: make test-unit", "run: python -m pytest", "not a make target"),
        ("ci.yml", r"run: make test-unit", "run: make test-unit && curl https://example.org", "not a make target"),
        ("ci.yml", r"- run: make test-unit", "", "nothing made"),
    ],
)
def test_each_check_can_fail(file, old, new, problem):
    text = (ROOT / ".github" / "workflows" / file).read_text(encoding="utf-8")
    broken, count = re.subn(old, new, text, count=1, flags=re.M)
    assert count and problem in problems(file, broken)
