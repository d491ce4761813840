"""What a release says of itself, in several places, agrees."""

import ast
import configparser
import datetime
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import pyproelbo as pe

ROOT = Path(__file__).parent.parent
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
RECIPE = yaml.safe_load((ROOT / ".conda" / "recipe.yaml").read_text(encoding="utf-8"))
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
IN_CONDA = {"torch": "pytorch", "matplotlib": "matplotlib-base"}  # with other names
MODULES = {"pyro-ppl": "pyro", "scikit-learn": "sklearn"}  # likewise


def releases():
    """The versions of the changelog, with their dates, from the newest."""
    return re.findall(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)$", CHANGELOG, re.MULTILINE)


def requirements(lines):
    """The bounds of each package, by its name, but for what an extra takes from others."""
    found = [re.match(r"([\w.-]+) *(.*)", line) for line in lines if line and "[" not in line]
    return {m[1]: {bound.strip() for bound in m[2].split(",")} for m in found}


def declared(extra=None):
    section, option = (
        ("options.extras_require", extra) if extra else ("options", "install_requires")
    )
    return requirements(SETUP[section][option].split("\n"))


def test_the_version_is_that_of_changelog_citation_and_recipe():
    version, date = releases()[0]
    assert version == pe.__version__ == CITATION["version"] == RECIPE["context"]["version"]
    assert date == str(CITATION["date-released"])
    assert datetime.date.fromisoformat(date)


def test_sections_of_the_changelog_are_releases_from_the_newest():
    titles = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
    if titles[0] == "Unreleased":
        del titles[0]
    assert titles == [f"{version} ({date})" for version, date in releases()]
    numbers = [tuple(map(int, version.split("."))) for version, _ in releases()]
    assert numbers == sorted({*numbers}, reverse=True)


def test_the_licence_is_the_same_everywhere():
    metadata = SETUP["metadata"]
    assert metadata["license_expression"] == CITATION["license"] == RECIPE["about"]["license"]
    assert "license" not in metadata and "License ::" not in metadata["classifiers"]
    text = (ROOT / metadata["license_files"]).read_text(encoding="utf-8")
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]


def test_what_the_recipe_needs_is_what_the_package_needs():
    needed = requirements(RECIPE["requirements"]["run"])
    python = needed.pop("python")
    assert needed == {IN_CONDA.get(name, name): bounds for name, bounds in declared().items()}
    least = RECIPE["context"]["python_min"]
    assert python == {">=${{ python_min }}"}
    assert SETUP["options"]["python_requires"] == f">={least}"
    extras = {**declared("lightning"), **declared("data"), **declared("cli")}
    assert requirements(RECIPE["requirements"]["run_constraints"]) == extras
    assert RECIPE["about"]["summary"] == SETUP["metadata"]["description"]
    entry = SETUP["options.entry_points"]["console_scripts"].strip()
    assert RECIPE["build"]["python"]["entry_points"] == [entry]


def test_what_is_built_with_is_the_same_for_conda():
    build = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert (
        re.search(r'^requires = \["setuptools>=(\d+)"\]', build, re.MULTILINE)[1]
        == (re.search(r"setuptools >=(\d+)", str(RECIPE["requirements"]["host"]))[1])
    )


def test_pythons_of_the_classifiers_are_tested():
    classifiers = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
    script = (ROOT / "tests" / "versions.sh").read_text(encoding="utf-8")
    assert classifiers == sorted({*re.findall(r"echo python(3\.\d+)", script)})


def test_what_is_imported_is_declared():
    extras = [declared(extra) for extra in ("lightning", "data", "parquet", "scale", "cli")]
    known = {MODULES.get(name, name) for needed in (declared(), *extras) for name in needed}
    for folder in ("pyproelbo", "models", "guides"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [node.module] if isinstance(node, ast.ImportFrom) else []
                names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
                roots = {name.split(".")[0] for name in names} - {"pyproelbo"}
                assert not roots - known - sys.stdlib_module_names, path


@pytest.fixture
def for_pypi(tmp_path):
    """What a release makes of the repository's files, and where."""
    for name in ("README.md", "setup.cfg"):
        shutil.copy(ROOT / name, tmp_path)
    path = ROOT / ".github" / "for_pypi.py"
    spec = importlib.util.spec_from_file_location("for_pypi", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main("https://example.org/us/it", "v1.2.3", tmp_path)
    return tmp_path


def test_a_readme_for_pypi_links_to_files_of_the_tag(for_pypi):
    before, text = ((f / "README.md").read_text(encoding="utf-8") for f in (ROOT, for_pypi))
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) == len(re.findall(r"\]\(", before)) > 20
    assert all("://" in link for link in links)
    base = "https://example.org/us/it/"
    files = [link.removeprefix(base).split("/", 2) for link in links if link.startswith(base)]
    for kind, tag, path in files:
        assert (kind, tag) == ("raw" if "figures" in path else "blob", "v1.2.3")
        assert (ROOT / path).exists(), path
    assert {kind for kind, _, _ in files} == {"raw", "blob"}
    assert "pip install pyproelbo " in text and 'pip install "pyproelbo[cli]"' in text
    assert not re.search(r'pip install "?\.', text)


def test_metadata_for_pypi_have_the_addresses_of_the_repository(for_pypi):
    config = configparser.ConfigParser()
    config.read(for_pypi / "setup.cfg", encoding="utf-8")
    urls = dict(
        line.split(" = ") for line in config["metadata"].pop("project_urls").split("\n")[1:]
    )
    assert urls["Repository"] == "https://example.org/us/it"
    assert all(url.startswith(urls["Repository"]) for url in urls.values())
    assert {name: dict(config[name]) for name in config} == {n: dict(SETUP[n]) for n in SETUP}


@pytest.mark.parametrize(("tag", "is_right"), [(f"v{pe.__version__}", True), ("v9.9.9", False)])
def test_the_tag_of_a_release_has_to_be_its_version(tag, is_right):
    path = ROOT / ".github" / "workflows" / "release.yml"
    steps = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]["build"]["steps"]
    (script,) = (step["run"] for step in steps if step.get("name", "").startswith("The tag is"))
    env = {**os.environ, "GITHUB_REF_NAME": tag}
    done = subprocess.run(["bash", "-e", "-c", script], cwd=ROOT, env=env, capture_output=True)
    assert (done.returncode == 0) == is_right, done.stderr
