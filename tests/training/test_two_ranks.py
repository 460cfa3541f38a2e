"""Two gloo processes through the command line do what one process does on the same global batches."""

import json

import pytest

from conftest import text_of_stdlib
from helpers.two_ranks import assert_same, fit


@pytest.fixture
def uneven(config, tmp_path) -> dict:
    """A run of 20 steps of 8 padded rows of 4 to 32 tokens, with all nine components weighed from early on."""
    text = text_of_stdlib(30_000)
    pieces = [text[at : at + 20 + at * 7 % 160] for at in range(0, len(text) - 180, 180)]
    (tmp_path / "pieces.jsonl").write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    config["trainer"] |= {"max_steps": 20, "val_check_interval": 10, "gradient_clip_val": 0.5}
    config["data"] |= {"dataset": str(tmp_path / "pieces.jsonl"), "packing": False, "per_device_batch_size": 8}
    config["model"] |= {"attention": {}, "layerwise": {}, "contrastive": {"tokens_per_row": 8, "queue_size": 200}}
    ramp = [[0.1, 0.0], [0.3, 0.1]]
    config["curriculum"] = dict.fromkeys(("feature", "attention", "layerwise", "contrastive"), ramp)
    return config


STRATEGIES = ("ddp", "fsdp2")


def test_two_ranks_equal_one_process(uneven, tmp_path):
    one = fit(uneven, tmp_path / "one")
    for key in ("feature", "attention", "layerwise", "contrastive"):
        assert max(float(row[f"curriculum/{key}"] or 0) for row in one[0]) == pytest.approx(0.1)
    uneven["data"]["per_device_batch_size"] = 4
    for strategy in STRATEGIES:
        flags = ("--trainer.strategy", strategy, "--trainer.devices", "2")
        assert_same(one, fit(uneven, tmp_path / strategy, *flags))


@pytest.mark.slow
def test_accumulation_equals_one_batch(uneven, tmp_path):
    """Without load balancing and the contrastive loss, which are statistics of a micro-batch."""
    del uneven["model"]["contrastive"], uneven["curriculum"]["contrastive"]
    names = ("feature_matching_loss", "expert_importance_loss", "attention_alignment_loss")
    uneven["model"]["routing"]["losses"] = dict.fromkeys(names, 1.0)
    one = fit(uneven, tmp_path / "one")
    uneven["data"]["per_device_batch_size"] = 4
    uneven["trainer"] |= {"accumulate_grad_batches": 2, "val_check_interval": 20}
    assert_same(one, fit(uneven, tmp_path / "accumulated"), same_blocks=False)
    uneven["data"]["per_device_batch_size"] = 2
    for strategy in STRATEGIES:
        flags = ("--trainer.strategy", strategy, "--trainer.devices", "2")
        assert_same(one, fit(uneven, tmp_path / strategy, *flags), same_blocks=False)
