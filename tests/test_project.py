"""What is packaged and pinned, and what the files beside the code promise."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def tracked_files() -> list[Path]:
    """Every file of the repository that git does not ignore."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def pinned(lock: str = "requirements.lock") -> dict[str, list[Requirement]]:
    pins: dict[str, list[Requirement]] = {}
    for line in (ROOT / lock).read_text().splitlines():
        requirement = Requirement(line)
        assert re.fullmatch(r"==[\w.+!]+", str(requirement.specifier)), f"not pinned: {line}"
        assert requirement.url is None
        pins.setdefault(requirement.name.lower(), []).append(requirement)
    return pins


EXTRAS = PROJECT["project"]["optional-dependencies"]
BASE = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"], "wheel"]


@pytest.mark.parametrize(
    ("lock", "wanted"),
    [
        ("requirements.lock", [*BASE, *(r for name, extra in EXTRAS.items() if name != "workflow" for r in extra)]),
        ("workflow/requirements.lock", EXTRAS["workflow"]),
    ],
)
def test_lock_pins_every_requirement(lock, wanted):
    pins = pinned(lock)
    for requirement in map(Requirement, wanted):
        if requirement.name == "kdrefs":
            assert requirement.extras <= set(EXTRAS)
            continue
        assert requirement.name.lower() in pins, f"{requirement} is not in {lock}; run `make lock`"
        for pin in pins[requirement.name.lower()]:
            version = str(pin.specifier).removeprefix("==")
            assert requirement.specifier.contains(version), f"{requirement} against {pin}; run `make lock`"


def test_the_workflow_engine_is_not_among_the_pins_that_numbers_are_tied_to():
    assert "snakemake" not in pinned()
    assert "torch" not in pinned("workflow/requirements.lock")


def test_conda_environment_installs_the_lock():
    yaml = pytest.importorskip("yaml")
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert f"python{PROJECT['project']['requires-python']}" in [str(d).split(",")[0] for d in dependencies]
    assert dependencies[-1] == {"pip": ["-r requirements.lock", "-e .", "-e reproductions"]}


def test_no_tracked_file_is_large():
    limit = 2_000_000
    assert [p.relative_to(ROOT).as_posix() for p in tracked_files() if p.stat().st_size > limit] == []


def test_no_tracked_file_names_a_machine_or_an_index():
    # Written in pieces, so that this file does not find itself.
    folders = "|".join(["work", "root", "home", "tmp", "Users", "mnt"])
    path = rf"(?<![\w.~}}/*-])/(?:{folders})/[\w.]|[A-Z]:\\+Users"
    index = r"index[-_]url|find[-_]links\b|https?://\S+/simple\b|files\.pythonhosted|registry\.npmjs|pypi\.org/simple"
    # These two options tell uv to leave addresses out of the lock.
    allowed = re.compile("--no-emit-" + r"(?:index-url|find-links)")
    pattern = re.compile(f"{path}|{index}")
    assert pattern.search("open('/" + "home/someone/x')")
    assert pattern.search("--index" + "-url x")
    found = []
    for file in tracked_files():
        data = file.read_bytes()
        if b"\0" in data or file == Path(__file__):
            continue
        for number, line in enumerate(data.decode("utf-8").splitlines(), start=1):
            if pattern.search(allowed.sub("", line)):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_wheel_holds_kdrefs_alone(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("kdrefs", "reproductions", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    subprocess.run([*build, source], check=True, timeout=120, capture_output=True)
    (wheel,) = tmp_path.glob("kdrefs-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"kdrefs"}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "kdrefs").rglob("*.py")} | {"kdrefs/py.typed"}
    assert sources <= set(names)


def readme_block(language: str, heading: str) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split(f"## {heading}\n", 1)[1].split("\n## ")[0]
    match = re.search(rf"^```{language}\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    assert match is not None
    return match[1]


def test_readme_training_loop_trains_student_and_projection():
    import torch
    from torch import nn

    code = readme_block("python", "In your own training loop")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    torch.manual_seed(0)
    student, teacher = nn.Linear(6, 16), nn.Linear(6, 32)
    before = student.weight.detach().clone(), teacher.weight.detach().clone()
    loader = [(torch.randn(8, 6), torch.zeros(8))] * 3
    space = {"student": student, "teacher": teacher, "loader": loader}
    exec(compile(code, "README.md", "exec"), space)
    assert not torch.equal(student.weight, before[0])
    assert torch.equal(teacher.weight, before[1])
    moments = space["optimizer"].state
    assert {*student.parameters(), *space["projection"].parameters()} == set(moments)
    assert all(moments[p]["exp_avg"].abs().sum() > 0 for p in moments)


def test_readme_names_only_files_and_commands_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", text)) <= targets
    cli = pytest.importorskip("reproductions.cli")
    commands = {c.name or c.callback.__name__ for c in cli.app.registered_commands}
    commands |= {g.name for g in cli.app.registered_groups}
    assert set(re.findall(r"^reproduce ([a-z]+)", text, re.MULTILINE)) <= commands


def test_readme_tables_are_up_to_date():
    from reproductions import readme

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.with_tables(text) == text, "run `make readme`"


def test_readme_tables_replace_what_stands_between_their_marks():
    from reproductions import readme

    text = "a\n<!-- t:begin -->\nold\n<!-- t:end -->\nb\n"
    new = readme.table(["x", "y"], [["1|2", "3"]])
    filled = readme.fill(text, {"t": new})
    assert filled == f"a\n<!-- t:begin -->\n{new}\n<!-- t:end -->\nb\n"
    assert new.splitlines()[2] == "| 1\\|2 | 3 |"
    assert readme.fill(filled, {"t": new}) == filled
    with pytest.raises(ValueError, match="'u'"):
        readme.fill(text, {"u": new})


def test_make_help_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    documented = set(re.findall(r"^([a-z-]+):.*## \S", text, re.MULTILINE))
    assert documented == set(phony[1].split())
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    shown = subprocess.run(["make"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert documented == set(re.findall(r"^  make ([a-z-]+) ", shown, re.MULTILINE))


def test_continuous_integration_is_pinned_and_runs_the_make_targets():
    yaml = pytest.importorskip("yaml")
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for workflow in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        content = yaml.safe_load(workflow.read_text())
        assert content["permissions"] == {"contents": "read"}
        steps = [step for job in content["jobs"].values() for step in job["steps"]]
        assert all(re.search(r"@[0-9a-f]{40}$", step["uses"]) for step in steps if "uses" in step)
        called = {t for step in steps for t in re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))}
        assert called <= targets
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o100
    if shutil.which("bash"):
        subprocess.run(["bash", "-n", script], check=True)


def test_versions_agree():
    import kdrefs

    version = PROJECT["project"]["version"]
    assert kdrefs.__version__ == version
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version}\n" in citation
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    address = PROJECT["tool"]["kdrefs"]["repository"]
    assert ("\nrepository-code:" in citation) == bool(address)
    assert address in citation
