"""The repository as a whole: linters, links, the README's results, and what no tracked file may name."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipestill import config
from workflow_project import Project, make_project

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
# In parts, so that this file does not name what it forbids.
MACHINE = [f"/{folder}/" for folder in ("work", "root")]
REGISTRIES = [f"{name}.{domain}" for name, domain in (("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"))]
REGISTRIES += ["-".join(words) for words in (("index", "url"), ("find", "links"))]

sys.path.insert(0, str(ROOT / "scripts"))
import results  # noqa: E402


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout


needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")


@pytest.mark.parametrize(
    "command",
    [
        "ruff check",
        "ruff format --check",
        "mypy",
        "snakefmt --check Snakefile workflow",
        "snakemake --lint",
    ],
)
def test_linters_find_nothing(command: str) -> None:
    program, *arguments = command.split()
    done = subprocess.run([BIN / program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    """Extras may hold programs that nothing imports; the core may not."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for texts in wanted["optional-dependencies"].values() for text in texts]
    core, every = distributions(wanted["dependencies"]), distributions(wanted["dependencies"] + extras)
    found: set[str] = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.partition(".")[0])
    homes = metadata.packages_distributions()
    foreign = found - sys.stdlib_module_names - {"pipestill"}
    imported = {name: distributions(homes[name]) for name in foreign if name in homes}
    assert {name for name, homes in imported.items() if not homes & every} == set()
    assert core - set().union(*imported.values()) == set()


def depends_on_locale(call: ast.Call) -> bool:
    """Whether a call reads or writes text in whatever encoding the user's locale names."""
    stated = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in stated:
        return False
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        return isinstance(call.func, ast.Attribute)  # pipestill.userfiles.read_text, a function, is for UTF-8
    if name in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile"):
        method = isinstance(call.func, ast.Attribute) and name == "open"
        place = 0 if method or name.endswith("File") else 1  # of the mode among the positional arguments
        default = ast.Constant("w+b" if name.endswith("File") else "r")
        mode = stated.get("mode", call.args[place] if len(call.args) > place else default)
        return isinstance(mode, ast.Constant) and "b" not in str(mode.value)
    return "text" in stated or "universal_newlines" in stated


def test_text_is_utf_8_whatever_the_locale() -> None:
    """Digests and messages must not depend on LC_ALL; a call names its encoding (Image.open and others read bytes)."""
    found = []
    for file in sorted(path for folder in ("src", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, ast.Call)]
        found += [
            f"{file.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call.func)} without encoding"
            for call in calls
            if depends_on_locale(call) and ast.unparse(call.func) not in ("os.open", "Image.open", "lmdb.open")
        ]
    for file in [ROOT / "Snakefile", *(ROOT / "workflow").rglob("*.smk")]:
        found += re.findall(r"(?:read|write)_text\((?![^)]*encoding=)", file.read_text(encoding="utf-8"))
    assert found == []


def distributions(requirements: list[str]) -> set[str]:
    """The distributions that requirements name, in the one spelling of their names."""
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def forbidden(text: str) -> list[str]:
    """What of a text names a machine of one's own or a package registry."""
    found = [path for path in MACHINE if re.search(rf"(?<![\w.}}/-]){re.escape(path)}", text)]
    return found + [name for name in REGISTRIES if name in text]


@needs_git
def test_no_tracked_file_names_a_machine_or_a_registry() -> None:
    found = {}
    for name in git("ls-files", "-z").decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and (names := forbidden(path.read_bytes().decode(errors="ignore"))):
            found[name] = names
    assert found == {}


def test_the_search_finds_what_it_is_for() -> None:
    for path in MACHINE:
        assert forbidden(f"cd {path}main") == [path]
        assert forbidden(f'"{path}main"') == [path]
        assert forbidden(f"shared{path}main") == []
    assert forbidden("see files." + REGISTRIES[1]) == [REGISTRIES[1]]
    assert forbidden("pip install --" + REGISTRIES[3] + " x") == [REGISTRIES[3]]
    assert forbidden('tmp_path / "work" / "root"') == []


def links(page: Path) -> list[str]:
    """Targets of a page's links and pictures that lie in the repository; code is no link."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if "://" not in target]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_every_page_is_in_the_index() -> None:
    listed = {(ROOT / "docs" / target).resolve() for target in links(ROOT / "docs" / "README.md")}
    assert listed == {page for page in ROOT.glob("docs/**/*.md") if page.name != "README.md"}


def test_the_readme_tells_of_every_stage() -> None:
    from pipestill import cli

    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)
    assert tuple(rows) == cli.stages()


def commands_of(page: str) -> list[list[str]]:
    """The commands in a page's plain blocks, in order."""
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL))
    return [line.split() for line in blocks.splitlines() if line.startswith(("pipestill ", "snakemake "))]


def with_photographs(root: Path) -> Project:
    """A fresh checkout, the demo's parameters in it, and photographs of two classes beside them."""
    from PIL import Image

    project = make_project(root)
    for label in ("cats", "dogs"):
        for number in range(8):
            file = project.root / "photos" / label / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            shade = 10 * number + 100 * (label == "dogs")
            Image.new("RGB", (40, 36), (shade, 255 - shade, number)).save(file)
    return project


def test_the_readmes_commands_parse(tmp_path: Path) -> None:
    """Its own images, from the check of a folder to the plan; its Python names what there is."""
    import pipestill

    text = (ROOT / "README.md").read_text()
    commands = commands_of(text)
    assert [command[0] for command in commands] == ["pipestill", "pipestill", "snakemake", "snakemake"]
    project = with_photographs(tmp_path / "project")
    for command in commands[:3]:
        project.run(*command)
    assert (project.root / "photos-report" / "report.html").exists()
    assert config.load(project.root / "params.yaml").data.path == "photos"
    assert {"dataset", "train@teacher", "report"} <= project.planned().keys()
    for name in re.findall(r"pipestill\.(\w+)\(", text):
        assert name in pipestill.__all__


def test_the_dataset_stages_examples_run(tmp_path: Path) -> None:
    """Those of its help, then those of its page, on ordinary photographs beside the demo's parameters."""
    from pipestill.stages import dataset

    shown = [line.split() for line in dataset.EXAMPLES.replace("\\\n", " ").splitlines() if line]
    told = commands_of((ROOT / "docs" / "stages" / "dataset.md").read_text())
    assert (len(shown), len(told)) == (3, 6)
    project = with_photographs(tmp_path / "project")
    for examples in (shown, told):
        for command in examples:
            project.run(*command)
        index = json.loads((project.root / "artifacts/dataset/index.json").read_text())
        assert (index["count"], index["resolution"], index["channels"]) == (16, 32, 3)
        assert index["classes"] == ["cats", "dogs"]
        assert (project.root / "photos.lmdb").is_file()
        assert (project.root / "photos-report" / "report.html").is_file()
        for made in ("artifacts", "photos-report"):
            shutil.rmtree(project.root / made)
        (project.root / "photos.lmdb").unlink()


def test_the_readme_holds_the_committed_results(tmp_path: Path) -> None:
    """Those that git has, whatever a run has written since."""
    folder = ROOT / "metrics"
    if (ROOT / ".git").exists():
        folder = tmp_path / "metrics"
        folder.mkdir()
        (tmp_path / "params.yaml").write_bytes(git("show", ":params.yaml"))
        for name in git("ls-files", "-z", "metrics").decode().split("\0"):
            if name:
                (folder / Path(name).name).write_bytes(git("show", f":{name}"))
    text = (ROOT / "README.md").read_text()
    assert results.filled(text, results.results(folder, judge=False)) == text, "run python scripts/results.py"


def test_results_are_written_between_the_marks_and_nowhere_else(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics"
    metrics.mkdir()
    (metrics / "floor.json").write_text('{"fd_classifier": 1.5, "images": 40}')
    (metrics / "few.json").write_text('{"fd_classifier": 3.25, "evaluations": 4}')
    (metrics / "many.json").write_text('{"fd_classifier": 2.5, "evaluations": 79}')
    page = tmp_path / "README.md"
    page.write_text(f"before\n{results.BEFORE}\nold\n{results.AFTER}\nafter\n")
    command = [sys.executable, ROOT / "scripts" / "results.py", "--metrics", metrics, "--readme", page]
    assert subprocess.run([*command, "--check"], capture_output=True, check=False).returncode == 1
    subprocess.run(command, check=True, capture_output=True)
    assert page.read_text().splitlines() == [
        "before",
        results.BEFORE,
        "| run | evaluations | distance, classifier features |",
        "| --- | ---: | ---: |",
        "| real against real | – | 1.50 |",
        "| many | 79 | 2.50 |",
        "| few | 4 | 3.25 |",
        results.AFTER,
        "after",
    ]
    assert subprocess.run([*command, "--check"], capture_output=True, check=False).returncode == 0
    shutil.rmtree(metrics)
    metrics.mkdir()
    assert results.results(metrics) == results.NONE


def test_the_unit_tests_are_of_pure_code() -> None:
    """`make check` is quick since none of these files starts a command or a pipeline."""
    names = (ROOT / "tests" / "unit.txt").read_text().split()
    assert names == sorted(set(names))
    for name in names:
        text = (ROOT / name).read_text()
        for helper in ("commands", "workflow_project", "forked", "miniatures", "slurm_cluster", "subprocess"):
            assert not re.search(rf"^(from|import) {helper}\b", text, re.MULTILINE), f"{name} uses {helper}"
