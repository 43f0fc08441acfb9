"""A wheel holds what an installed `stepaudio` needs, and every command that the documents show can be parsed."""

import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from stepaudio_train.cli import build_parser
from stepaudio_train.commands.run import find_recipe
from stepaudio_train.config.paths import configs_dir

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_a_wheel_runs_without_the_repository(tmp_path: Path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = (
        "from stepaudio_train.config.paths import configs_dir, recipes_dir;"
        "from stepaudio_train.config.compose import load_config;"
        "from stepaudio_train.config.schema import PretrainConfig;"
        "import data_tools.make_corpus;"
        "load_config('pretrain', PretrainConfig, ['experiment=debug']);"
        "print(configs_dir(), recipes_dir() / 'pretrain.py', data_tools.make_corpus.__file__)"
    )
    # The unpacked wheel stands on the path before the repository, and the working folder is neither.
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    places = [Path(place) for place in result.stdout.split()]
    assert all(place.exists() and place.is_relative_to(site) for place in places), places


def shown_commands() -> list[str]:
    found = []
    for document in DOCUMENTS:
        text = re.sub(r"\\\n\s*", " ", document.read_text(encoding="utf-8"))
        blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        found += [line.strip() for block in blocks for line in block.splitlines() if line.startswith("stepaudio ")]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("command", shown_commands())
def test_documented_commands_parse(command: str):
    options = build_parser().parse_args(shlex.split(command, comments=True)[1:])
    if options.name == "run":
        assert find_recipe(options.recipe).is_file()
    for override in getattr(options, "overrides", ()):
        key, _, value = override.partition("=")
        assert key != "experiment" or (configs_dir() / "experiment" / f"{value}.yaml").is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_of_documents_exist(document: Path):
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (document.parent / link).exists(), link
    named = re.findall(r"`((?:stepaudio_train|recipes|configs|launch|benchmarks|tests)/[\w./-]+)`", text)
    assert all((ROOT / name).exists() for name in named), named
