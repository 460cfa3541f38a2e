"""Data workers: their errors are the user's in one line, and they do not outlive the run that started them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOLD = "its completion_mask holds other numbers than 0 and 1; repair or remove it"


@pytest.fixture
def late(tmp_path):
    """A stream whose last document is none, and one to validate on."""
    rows = [{"input_ids": [5, 6, 7 + i], "completion_mask": [0, 1, 1]} for i in range(30)]
    (tmp_path / "held_out.jsonl").write_text(json.dumps(rows[0]) + "\n")
    rows[29]["completion_mask"] = [0, 1, 2]
    path = tmp_path / "late.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PROGRAM = """
import sys
from distill.data.datamodule import DistillationDataModule
from distill.errors import UserError

path, held_out, tokenizer, workers = sys.argv[1:]
options = {"streaming": True, "shuffle_buffer": 6, "packing": False, "sequence_length": 8}
data = DistillationDataModule(path, validation_split=held_out, tokenizer=tokenizer, num_workers=int(workers), **options)
data.prepare_data()
data.setup("fit")
loader = data.train_dataloader()
try:
    for _, batch in zip(range(100), loader):
        pass
except UserError as error:
    kept = error  # and with it, by torch's own cycles, the workers that ignore SIGTERM
    print(error)
    sys.exit(3)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_is_one_line_and_ends_the_program(late, assets, workers):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3] / "src"), "OMP_NUM_THREADS": "1"}
    environment["HF_DATASETS_CACHE"] = str(late.parent / "cache")
    given = [str(late), str(late.with_name("held_out.jsonl")), str(assets / "llama"), str(workers)]
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *given]
    done = subprocess.run(command, env=environment, timeout=120, capture_output=True, check=False, text=True)
    assert done.stdout == f"data.dataset: {late}, the document [5, 6, 36]...: {TOLD}\n", done.stderr
    assert done.returncode == 3
