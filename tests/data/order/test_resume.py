"""Runs broken off anywhere go on with exactly the batches that were left."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from distill.errors import UserError
from helpers.broken_off import Break, noted_run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]
ROWS, BATCH = 14, 2  # seven micro-batches per epoch: with two per step, the last window of an epoch is short
EPOCHS = 2


@pytest.fixture
def run(assets, tmp_path):
    def call(*callbacks, ckpt_path=None, data_options=None, **trainer_options):
        options = {"max_epochs": EPOCHS} | trainer_options
        data = {
            "dataset": str(assets / "text.txt"),
            "tokenizer": str(assets / "llama"),
            "sequence_length": 32,
            "per_device_batch_size": BATCH,
            "max_sequences": ROWS,
            "max_validation_sequences": 2,
        } | (data_options or {})
        return noted_run(data, callbacks, ckpt_path, **options)

    return call


def saved(run, tmp_path, **options):
    """A whole run that saves after every step and epoch: its module, and its checkpoints by file name."""
    every_step = ModelCheckpoint(
        tmp_path / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
    )
    every_epoch = ModelCheckpoint(tmp_path / "epochs", filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
    whole = run(every_step, every_epoch, **options)
    return whole, sorted((tmp_path / "steps").iterdir()) + sorted((tmp_path / "epochs").iterdir())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_goes_on_from_every_step_and_epoch(run, tmp_path, accumulate):
    whole, checkpoints = saved(run, tmp_path, accumulate_grad_batches=accumulate)
    micro_batches = [seen for seen, _ in whole.seen]
    assert len(micro_batches) == EPOCHS * 7
    steps_per_epoch = -(-7 // accumulate)
    assert len(checkpoints) == EPOCHS * steps_per_epoch + EPOCHS
    for path in checkpoints:
        epoch, step = divmod(int(path.stem.removeprefix("step=")), steps_per_epoch)
        done = epoch * 7 + step * accumulate
        rest = run(ckpt_path=path, accumulate_grad_batches=accumulate)
        assert rest.seen == whole.seen[done:], path
        assert torch.equal(rest.weight, whole.weight), path


def test_goes_on_with_workers(run, tmp_path):
    whole, checkpoints = saved(run, tmp_path, data_options={"num_workers": 2})
    assert whole.seen == run().seen
    path = next(path for path in checkpoints if path.stem == "step=3")
    assert run(ckpt_path=path, data_options={"num_workers": 2}).seen == whole.seen[6:]


@pytest.mark.parametrize("at", [2, 6, 7, 9, 11])
def test_goes_on_after_an_exception(run, tmp_path, at):
    whole = run()
    safety = ModelCheckpoint(tmp_path / "broken", filename="last", save_on_exception=True)
    broken = run(safety, Break(at))
    assert broken.seen == whole.seen[:at]
    assert run(ckpt_path=tmp_path / "broken" / "last.ckpt").seen == whole.seen[at:]


def test_goes_on_under_a_limit_on_steps(run, tmp_path):
    whole = run(max_epochs=None, max_steps=7)
    run(ModelCheckpoint(tmp_path / "m", filename="{step}", every_n_train_steps=3), max_epochs=None, max_steps=3)
    rest = run(ckpt_path=tmp_path / "m" / "step=3.ckpt", max_epochs=None, max_steps=7)
    assert rest.seen == whole.seen[6:]


def test_goes_on_with_limited_batches_and_validation_within_the_epoch(run, tmp_path):
    options = {"limit_train_batches": 5, "val_check_interval": 2}
    whole, checkpoints = saved(run, tmp_path, **options)
    for path in checkpoints:
        epoch, step = divmod(int(path.stem.removeprefix("step=")), 3)
        assert run(ckpt_path=path, **options).seen == whole.seen[epoch * 5 + step * 2 :], path


@pytest.mark.parametrize(
    ("data_options", "trainer_options", "told"),
    [
        ({"per_device_batch_size": 1}, {}, "data.per_device_batch_size: 1, but the checkpoint .* with 2"),
        ({"seed": 5}, {}, "data.seed: 5"),
        (
            {"sequence_length": 16, "max_sequences": 13},
            {},
            r"^data.sequence_length: 16, but the checkpoint stands within an epoch of rows made with "
            r"data.sequence_length: 32, data.max_sequences: 14 \(now 13\); resume with the same, or from a checkpoint",
        ),
        ({}, {"accumulate_grad_batches": 1}, "trainer.accumulate_grad_batches: 1"),
    ],
)
def test_a_place_within_other_data_is_refused(run, tmp_path, data_options, trainer_options, told):
    _, checkpoints = saved(run, tmp_path)
    path = next(path for path in checkpoints if path.stem == "step=2")
    with pytest.raises(UserError, match=told):
        run(ckpt_path=path, data_options=data_options, **trainer_options)


def test_a_file_that_has_changed_is_told(run, tmp_path, assets):
    own = tmp_path / "own.txt"
    own.write_text((assets / "text.txt").read_text())
    _, checkpoints = saved(run, tmp_path, data_options={"dataset": str(own)})
    own.write_text(own.read_text()[::-1])
    path = next(path for path in checkpoints if path.stem == "step=2")
    with pytest.raises(
        UserError, match=r"^data.dataset: '.*own.txt' holds other rows than when .*; restore it, or from"
    ):
        run(ckpt_path=path, data_options={"dataset": str(own)})


def test_an_epoch_may_end_with_one_batch_size_and_begin_with_another(run, tmp_path):
    whole, _ = saved(run, tmp_path)
    [path] = (tmp_path / "epochs").glob("step=4.ckpt")
    rest = run(ckpt_path=path, data_options={"per_device_batch_size": 1}, accumulate_grad_batches=4)
    assert [first for ids, _ in rest.seen for first in ids] == [first for ids, _ in whole.seen[7:] for first in ids]
