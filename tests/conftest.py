"""Fixtures: a tiny teacher on disk with a tokenizer of its own, text from the standard library, and a command line."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers.chat_templates import PLAIN
from helpers.tiny import tiny_llama, tiny_qwen3_moe

VOCABULARY = 320
torch.set_num_threads(1)  # tiny tensors: two threads only wait for each other


def text_of_stdlib(characters: int) -> str:
    """Plain ASCII text that ships with Python, the same on every machine of one version."""
    from pydoc_data import topics

    return "\n".join(topics.topics[key] for key in sorted(topics.topics))[:characters]


@pytest.fixture(autouse=True)
def _leave_torch_as_found():
    precision = torch.get_float32_matmul_precision()
    torch.manual_seed(0)
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="session")
def students(tmp_path_factory) -> Path:
    """Where students that are made lie, in the place of the user's cache."""
    return tmp_path_factory.mktemp("students")


@pytest.fixture(autouse=True)
def _students_of_their_own(students, monkeypatch):
    def folder() -> Path:
        return Path(os.environ.get("DISTILL_CACHE") or students)

    monkeypatch.setattr("distill.models.start.cache.cache_dir", folder)


@pytest.fixture(scope="session")
def assets(tmp_path_factory) -> Path:
    """Folder with `llama` and `qwen3_moe` teachers, their tokenizer and `text.txt`."""
    root = tmp_path_factory.mktemp("assets")
    text = text_of_stdlib(40_000)
    (root / "text.txt").write_text(text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    for name, build in (("llama", tiny_llama), ("qwen3_moe", tiny_qwen3_moe)):
        model = build(vocab_size=VOCABULARY, num_hidden_layers=4)
        model.save_pretrained(root / name)
        fast.save_pretrained(root / name)
    return root


@pytest.fixture(scope="session")
def tokenizer(assets):
    from distill.models.load import load_tokenizer

    return load_tokenizer(str(assets / "llama"))


@pytest.fixture(scope="session")
def chat_tokenizer(assets):
    """The tiny tokenizer with two tokens and a template for turns; 322 ids."""
    from distill.models.load import load_tokenizer

    tokenizer = load_tokenizer(str(assets / "llama"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = PLAIN
    return tokenizer


@pytest.fixture(scope="session")
def chat_folder(chat_tokenizer, tmp_path_factory):
    """That tokenizer on disk."""
    folder = tmp_path_factory.mktemp("chat_tokenizer")
    chat_tokenizer.save_pretrained(folder)
    return folder


def small_config(assets: Path) -> dict:
    """A configuration of a run of a few seconds with the six components of KD, next tokens and routing."""
    return {
        "seed_everything": 1,
        "model": {
            "teacher": str(assets / "llama"),
            "student_layers": 2,
            "student_fit": None,
            "routing": {"teacher_layers": 2, "num_experts": 4},
            "learning_rate": 1e-3,
        },
        "data": {
            "dataset": str(assets / "text.txt"),
            "sequence_length": 32,
            "per_device_batch_size": 4,
            "max_validation_sequences": 8,
        },
        "trainer": {"max_steps": 20, "accelerator": "cpu", "log_every_n_steps": 1},
        "progress": None,
    }


@pytest.fixture
def config(assets, tmp_path, monkeypatch) -> dict:
    """`small_config`; the working directory is empty."""
    monkeypatch.chdir(tmp_path)
    return small_config(assets)


@pytest.fixture
def distill(tmp_path, monkeypatch):
    """Runs the program in this process: `distill("fit", config, "--trainer.max_steps", "3")`."""
    from distill.commands.fit import run

    def call(subcommand: str, config: dict, *args: str):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        monkeypatch.setattr("sys.argv", ["distill"])
        return run([subcommand, "--config", str(path), *args])

    return call


def log_of(cli) -> str:
    """Text of the run's `training.log`."""
    return Path(cli.trainer.log_dir, "training.log").read_text()
