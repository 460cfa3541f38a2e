"""A finished run of three steps on the tiny teacher, for what works with its checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import yaml


def finished_run(assets: Path, folder: Path, **model: Any) -> tuple[str, Any]:
    """Fits in `folder` as the command line does, all six components on; path of the checkpoint, and the CLI object."""
    from distill.program import run

    config = {
        "seed_everything": 1,
        "model": {
            "teacher": str(assets / "llama"),
            "student_layers": 2,
            "routing": {"teacher_layers": 2, "num_experts": 4},
            "learning_rate": 1e-3,
            **model,
        },
        "data": {
            "dataset": str(assets / "text.txt"),
            "tokenizer": str(assets / "llama"),
            "sequence_length": 32,
            "max_validation_sequences": 6,
        },
        "trainer": {"max_steps": 3, "accelerator": "cpu", "default_root_dir": str(folder), "num_sanity_val_steps": 0},
        "curriculum": {"kd": 0.9},
        "progress": None,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["distill"])
        cli = run(["fit", "--config", str(folder / "config.yaml")])
    return str(Path(cli.trainer.log_dir, "checkpoints", "last.ckpt")), cli
