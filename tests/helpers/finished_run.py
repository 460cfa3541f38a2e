"""A finished run of three steps on the tiny teacher, for what works with its checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import small_config


def finished_run(assets: Path, folder: Path, **model: Any) -> tuple[str, Any]:
    """Fits in `folder` as the command line does, all six components on; path of the checkpoint, and the CLI object."""
    from distill.commands.fit import run

    config = small_config(assets)
    config["model"] |= model
    config["data"] |= {"tokenizer": str(assets / "llama"), "max_validation_sequences": 6}
    config["trainer"] |= {"max_steps": 3, "default_root_dir": str(folder), "num_sanity_val_steps": 0}
    config["curriculum"] = {"kd": 0.9}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["distill"])
        cli = run(["fit", "--config", str(folder / "config.yaml")])
    return str(Path(cli.trainer.log_dir, "checkpoints", "last.ckpt")), cli
