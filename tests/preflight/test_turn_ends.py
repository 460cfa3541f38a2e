"""What `check` and the log say of answers without an end, or with an end where generation goes on."""

import copy
import json

import pytest
import yaml

from conftest import log_of
from distill.data.documents.chat import Chat
from distill.preflight.turn_ends import answer_ends, turn_end_findings
from helpers.chat_templates import MARKED, PLAIN
from helpers.tiny import tiny_llama

ENDLESS = PLAIN.replace("<|im_end|>", "")
ONCE = MARKED.replace("+ '<|im_end|>' }}{% endgen", "+ ('<|im_end|>' if loop.last else '') }}{% endgen")
ONE_TURN = "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}" + PLAIN


@pytest.fixture
def end(chat_tokenizer) -> int:
    return chat_tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("template", [PLAIN, MARKED, ONE_TURN], ids=["prefixes", "marks", "one turn"])
@pytest.mark.parametrize("completion_only_loss", [True, False])
def test_the_end_of_an_answer(chat_tokenizer, template, completion_only_loss, end):
    chat = Chat(template, completion_only_loss=completion_only_loss)
    assert answer_ends(chat_tokenizer, chat) == {end}
    for stops in (end, [0, end], None):
        assert turn_end_findings(chat_tokenizer, chat, True, stops) == []


@pytest.mark.parametrize(("template", "last"), [(ENDLESS, "'\\n'"), (ONCE, "'b'")], ids=["never", "the last alone"])
def test_answers_without_an_end_are_told(chat_tokenizer, template, last, end):
    [finding] = turn_end_findings(chat_tokenizer, Chat(template), True, end)
    assert finding == (
        f"data.chat_template: answers end with {last} and no token of their own, so the student never learns to "
        "stop: let the template end them, for instance with '<eos>'"
    )


def test_texts_without_an_end_are_told(tokenizer):
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    [finding] = turn_end_findings(endless, Chat(), False, None)
    assert finding.startswith("data.tokenizer: it has no end-of-sequence token, so documents of text end with none")
    assert turn_end_findings(tokenizer, Chat(), False, None) == []


def test_another_end_in_the_generation_config_is_told(chat_tokenizer, end):
    eos = chat_tokenizer.eos_token_id
    [finding] = turn_end_findings(chat_tokenizer, Chat(PLAIN), True, eos)
    assert finding == (
        "student: answers end with '<|im_end|>', but its generation_config stops at '<eos>' (eos_token_id), so an "
        f"exported student would talk on: add {end} to eos_token_id there"
    )
    [finding] = turn_end_findings(chat_tokenizer, Chat(), False, [end])
    assert finding.startswith("student: documents end with '<eos>', but its generation_config stops at '<|im_end|>'")
    assert turn_end_findings(chat_tokenizer, Chat(), False, [end, eos]) == []


def test_a_template_that_refuses_is_left_to_the_data(chat_tokenizer):
    assert turn_end_findings(chat_tokenizer, Chat("{{ raise_exception('no') }}"), True, 3) == []


@pytest.fixture
def chats(config, assets, chat_folder, tmp_path) -> dict:
    """A run on conversations whose models stop where their tokenizer's texts end."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 40)
    folder = tmp_path / "teacher"
    tiny_llama(vocab_size=322, num_hidden_layers=4, eos_token_id=0, bos_token_id=0).save_pretrained(folder)
    del config["model"]["routing"]
    config["model"]["teacher"] = str(folder)
    config["data"] |= {"dataset": str(tmp_path / "chats.jsonl"), "tokenizer": str(chat_folder)}
    config["trainer"] |= {"max_steps": 1}
    return config


def test_check_and_the_log_say_so(chats, distill, tmp_path, capsys, monkeypatch):
    from distill.cli import main

    said = "student: answers end with '<|im_end|>', but its generation_config stops at '<eos>'"
    cli = distill("fit", chats)
    assert f"Suspicious: {said}" in log_of(cli)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(chats))
    monkeypatch.setattr("sys.argv", ["distill", "check", "--config", str(tmp_path / "config.yaml")])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main()
    assert f"Suspicious: {said}" in capsys.readouterr().out
