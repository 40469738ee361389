"""Documents are executed: README's commands run, the CLI page is what --help says."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
from click.testing import CliRunner
from conftest import CLASSES

from fkdpipe.cli import cli
from fkdpipe.commands import demo_data
from fkdpipe.networks import weight_files

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()

# README's numbers are those of real use; here they are small enough for two cores.
SMALLER = {
    "--crops 200": "--crops 4",
    "--epochs 100": "--epochs 4 --size 32 --batch-size 16",
    "--form topk:10": "--form topk:5",
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def test_the_make_commands_of_the_readme_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    (first,) = (b for b in blocks(README, "sh") if b.startswith("make"))
    assert {line.split()[1] for line in first.splitlines()} <= targets
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_the_commands_for_own_images_run_as_written(tmp_path, folder, monkeypatch):
    shutil.copytree(folder, tmp_path / "images")
    module = timm.create_model("resnet50", num_classes=len(CLASSES))
    weight_files.write_export(tmp_path / "teacher.safetensors", module, {"size": [64, 64]})
    block = next(b for b in blocks(README, "sh") if "fkdpipe generate" in b)
    for long, short in SMALLER.items():
        assert long in block
        block = block.replace(long, short)
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        words = shlex.split(line)
        assert words[0] == "fkdpipe"
        done = CliRunner().invoke(cli, words[1:])  # importing torch once, not seven times
        assert done.exit_code == 0, f"{line}\n{done.output}"


@pytest.mark.slow
def test_the_commands_for_fine_tuning_run_as_written(tmp_path, folder, monkeypatch):
    (tmp_path / "images").symlink_to(folder)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for depth in (18, 50):  # weights for other classes, as ImageNet's
        module = timm.create_model(f"resnet{depth}", num_classes=9)
        weight_files.write_export(tmp_path / f"imagenet{depth}.safetensors", module, {})
    (block,) = (b for b in blocks(README, "sh") if "finetune-small" in b)
    assert len(block.splitlines()) == 4
    smaller = {"--crops 100": "--crops 4", ".toml --": ".toml --epochs 4 --size 32 --"}
    for long, short in smaller.items():
        assert long in block
        block = block.replace(long, short)
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        done = CliRunner().invoke(cli, shlex.split(line)[1:])
        assert done.exit_code == 0, f"{line}\n{done.output}"
        few = "the run has only" in done.output
        assert few == ("fkdpipe train" in line), done.output


@pytest.mark.slow
def test_the_guide_to_inspecting_runs_as_written(tmp_path, folder, teacher, monkeypatch):
    from pipeline import make_store

    (tmp_path / "images").symlink_to(folder)
    make_store(tmp_path / "store", folder, [teacher])
    module = timm.create_model("resnet18", num_classes=len(CLASSES))
    weight_files.write_export(tmp_path / "student.safetensors", module, {"size": [32, 32]})
    monkeypatch.chdir(tmp_path)
    commands = "".join(blocks((ROOT / "docs" / "guide-inspect.md").read_text(), "sh")).splitlines()
    assert len(commands) == 10
    for line in commands:
        words = shlex.split(line)
        assert words[0] == "fkdpipe"
        done = CliRunner().invoke(cli, words[1:])
        assert done.exit_code == 0, f"{line}\n{done.output}"
        if "--out" in words:
            assert Path(words[words.index("--out") + 1]).stat().st_size > 1000


def test_the_cli_page_is_generated(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import make_cli

    assert make_cli.FILE.read_text() == make_cli.render(), "run `make docs`"


def test_the_table_of_bytes_is_generated(monkeypatch):
    pytest.importorskip("timm", minversion="1.0.31")  # before, no RegNet on the meta device
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import make_bytes

    page = make_bytes.FILE.read_text()
    assert page == make_bytes.fill(page), "run `make docs`"
    assert "| `resnet50` | 2,048 | 4,096 | 1,024 | 516 | 200,704 |" in page


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        *(
            f"docs/{n}.md"
            for n in (
                "python",
                "format",
                "methods",
                "cli",
                "training",
                "guide-features",
                "guide-inspect",
                "guide-interchange",
                "guide-transfer",
            )
        ),
    ],
)
def test_links_lead_somewhere(page):
    file = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", file.read_text()):
        if "://" not in target:
            assert (file.parent / target).exists(), target


def test_the_demos_commands_parse():
    for words in demo_data.commands(Path("demo")).values():
        cli.commands[words[0]].make_context(words[0], words[1:])


@pytest.mark.slow
def test_the_demo_on_a_few_scans(tmp_path, monkeypatch):
    """The same steps with tiny numbers; `make demo` runs them in full."""

    plain = demo_data.commands

    def tiny(out):
        small = {"60": "4", "64": "32"}
        commands = plain(out)
        return {why: [small.get(word, word) for word in words] for why, words in commands.items()}

    started: list[str] = []

    def start(words: list[str]) -> tuple[int, str]:
        """A process of its own for one command; importing torch nine times takes 20 s."""
        started.append(words[0])
        if words[0] == "verify":
            return process(words)
        done = CliRunner().invoke(cli, words)
        return done.exit_code, done.stdout

    process, pictures = demo_data.run_command, demo_data.make_images
    monkeypatch.setattr(demo_data, "run_command", start)
    monkeypatch.setattr(demo_data, "commands", tiny)
    monkeypatch.setattr(demo_data, "make_images", lambda root, **k: pictures(root, count=150))
    said: list[str] = []
    outcome = demo_data.run(tmp_path / "demo", say=said.append)
    assert len(started) == 9
    assert 0 <= outcome.distilled <= 100
    assert sum(line.startswith("\n#") for line in said) == 9
    assert (outcome.store / "zarr.json").is_file()
    assert len(list((tmp_path / "demo" / "images" / "val").rglob("*.jpg"))) > 10
