"""A task file of one's own for lm-evaluation-harness, whose right answers are worked out without it."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml

NAME = "local_choice"
ITEMS = [("import", [" sys", " zq"], 0), ("for name in", [" xq", " names"], 1), ("def", [" f", " 9"], 0)]


def write(folder: Path) -> None:
    """Writes the task's file and its three items."""
    lines = [json.dumps({"question": q, "choices": c, "answer": a}) for q, c, a in ITEMS]
    (folder / "items.jsonl").write_text("\n".join(lines))
    task = {
        "task": NAME,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",  # the choices begin with a space
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "local.yaml").write_text(yaml.safe_dump(task))


def accuracy(model: Any, tokenizer: Any) -> float:
    """Share of the items whose right choice is the likelier one."""
    right = 0
    for question, choices, answer in ITEMS:
        scores = []
        for choice in choices:
            context, whole = (tokenizer(text)["input_ids"] for text in (question, question + choice))
            with torch.no_grad():
                logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(logprobs[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
        right += scores.index(max(scores)) == answer
    return right / len(ITEMS)
