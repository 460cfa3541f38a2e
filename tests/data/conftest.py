"""Fixtures: a cache of `datasets` that all tests here share and that vanishes with the session."""

import datasets
import pytest

from helpers.chat_templates import PLAIN


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets_cache")


@pytest.fixture(autouse=True)
def _own_cache(cache, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


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
