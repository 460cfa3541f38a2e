"""The data module by itself and under a trainer: what is held out, what is counted, what is refused."""

from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from distill.data.datamodule import DistillationDataModule
from distill.errors import UserError


@pytest.fixture
def options(assets):
    return {"dataset": str(assets / "text.txt"), "tokenizer": str(assets / "llama"), "sequence_length": 64}


def ready(options, **more):
    data = DistillationDataModule(**(options | more))
    data.prepare_data()
    data.setup()
    return data


def ids(loader) -> list[tuple[int, ...]]:
    return [
        tuple(row.tolist()) for batch in loader for row in batch.student.input_ids if batch.student.attention_mask.any()
    ]


def test_training_and_validation_rows_are_the_text(options, assets):
    data = ready(options)
    rows = set(ids(data.train_dataloader())) | set(ids(data.val_dataloader()))
    expected = data.tokenizer((assets / "text.txt").read_text())["input_ids"] + [data.tokenizer.eos_token_id]
    cut = [expected[at : at + 64] for at in range(0, len(expected), 64)]
    cut[-1] += [data.tokenizer.pad_token_id] * (64 - len(cut[-1]))
    assert rows == {tuple(row) for row in cut}
    assert len(ids(data.val_dataloader())) == round(0.05 * len(cut))


def test_batch_units_are_its_own_without_a_trainer(options):
    for loader in (ready(options).train_dataloader(), ready(options).val_dataloader()):
        for batch in loader:
            tokens = int((batch.student.labels[:, 1:] != -100).sum())
            assert batch.student.input_ids.shape[1] == 64
            assert batch.units == {
                "tokens": tokens,
                "queries": tokens - len(batch.student.input_ids),
                "micro_batches": 1,
            }
            assert batch.student.positions.numel() == tokens


def test_held_out_rows_depend_on_the_seed_alone(options):
    first, same, other = (set(ids(ready(options, seed=seed).val_dataloader())) for seed in (0, 0, 1))
    assert first == same
    assert first != other


def test_limits_on_rows(options):
    whole, data = ready(options), ready(options, max_sequences=10, max_validation_sequences=3)
    assert (len(data.train_rows), len(data.validation_rows)) == (10, 3)
    assert set(ids(data.train_dataloader())) <= set(ids(whole.train_dataloader()))


def test_second_run_reads_the_cache(options, monkeypatch):
    first = ready(options)
    monkeypatch.setattr("distill.data.documents.encode.tokenize", lambda *_: pytest.fail("tokenised again"))
    assert ids(ready(options).val_dataloader()) == ids(first.val_dataloader())


def test_validation_from_another_file(options, tmp_path):
    (tmp_path / "held_out.txt").write_text("quite another text, which is not in the training data " * 8)
    data = ready(options, validation_split=str(tmp_path / "held_out.txt"))
    text = data.tokenizer.decode(ids(data.val_dataloader())[0])
    assert text.startswith("quite another text")
    assert not set(ids(data.train_dataloader())) & set(ids(data.val_dataloader()))


def test_test_reads_validation_rows(options):
    data = ready(options)
    assert ids(data.test_dataloader()) == ids(data.val_dataloader())


def test_workers_give_the_same_batches(options):
    alone, helped = ready(options), ready(options, num_workers=2)
    assert ids(alone.train_dataloader()) == ids(helped.train_dataloader())


def test_loaders_leave_the_global_random_state_alone(options):
    data = ready(options)
    before = torch.get_rng_state()
    ids(data.train_dataloader()), ids(data.val_dataloader())
    assert torch.equal(before, torch.get_rng_state())


def test_bytes_are_those_of_the_labels(options):
    data = ready(options, per_device_batch_size=1)
    for batch in data.val_dataloader():
        targets = batch.student.labels[batch.student.labels != -100].tolist()
        text = data.tokenizer.decode(targets, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert batch.bytes == len(text.encode())


def test_options_from_yaml_keep_their_types():
    parser = ArgumentParser()
    parser.add_class_arguments(DistillationDataModule, "data")
    for text, value in (("0.1", 0.1), ("validation", "validation")):
        parsed = parser.parse_args(["--data.dataset", "x", "--data.validation_split", text]).data
        assert parsed.validation_split == value
        assert type(parsed.validation_split) is type(value)
    assert parser.parse_args(["--data.dataset", '["x", "y"]']).data.dataset == ["x", "y"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"per_device_batch_size": 0}, "data.per_device_batch_size: 0; give 1 or more"),
        ({"sequence_length": 1}, "data.sequence_length: 1; give 2 or more"),
        ({"validation_split": 0.0}, "data.validation_split: 0.0; give a fraction"),
        ({"validation_split": 1.5}, "data.validation_split: 1.5; give a fraction"),
        ({"validation_split": "validation"}, "data.validation_split: 'validation' is no local file"),
        ({"sequence_length": 100_000}, "data.validation_split: 0.05 of 1 rows leaves none"),
        ({"tokenizer": None}, "data.tokenizer: null, and there is no teacher"),
        ({"max_sequences": 0}, "data.max_sequences: 0; give 1 or more"),
    ],
)
def test_refused_options(options, wrong, told):
    with pytest.raises(UserError, match=told):
        ready(options, **wrong)


def trainer_of(module=None, world_size=1, distributed_sampler=False, overfit=0):
    connector = SimpleNamespace(use_distributed_sampler=distributed_sampler)
    return SimpleNamespace(
        lightning_module=module,
        world_size=world_size,
        global_rank=world_size - 1,
        overfit_batches=overfit,
        accumulate_grad_batches=1,
        num_training_batches=10**6,
        _accelerator_connector=connector,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )


def test_teacher_gives_the_tokenizer_and_the_context(options, assets):
    data = DistillationDataModule(**(options | {"tokenizer": None, "sequence_length": 65}))
    data.trainer = trainer_of(SimpleNamespace(teacher_source=str(assets / "llama"), max_context=64))
    with pytest.raises(UserError, match=r"data.sequence_length: 65 exceeds the 64 tokens"):
        data.prepare_data()
    data.sequence_length = 64
    data.prepare_data()
    assert data.tokenizer.eos_token == "<eos>"


def test_ranks_share_the_rows(options):
    whole, parts = ready(options), []
    for rank in range(2):
        data = ready(options, per_device_batch_size=2)
        data.trainer = trainer_of(world_size=2)
        data.trainer.global_rank = rank
        parts += [ids(data.train_dataloader())]
    alone = ids(whole.train_dataloader())
    assert sorted(parts[0] + parts[1]) == sorted(alone)
    assert {*parts[0][:2], *parts[1][:2]} == set(alone[:4])


def test_trainers_that_would_deal_out_the_rows_again_are_refused(options):
    data = ready(options)
    data.trainer = trainer_of(world_size=2, distributed_sampler=True)
    with pytest.raises(UserError, match=r"trainer.use_distributed_sampler: true"):
        data.train_dataloader()
    with pytest.raises(UserError, match=r"trainer.use_distributed_sampler: true"):
        data.val_dataloader()
    data.trainer = trainer_of(overfit=2)
    with pytest.raises(UserError, match=r"trainer.overfit_batches: 2"):
        data.train_dataloader()


class Toy(L.LightningModule):
    """Notes what arrives."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[dict] = []
        self.validated: list[tuple[int, ...]] = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        self.validated += ids([batch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_units_under_a_trainer_are_those_of_its_windows(options):
    module, data = Toy(), DistillationDataModule(**options, max_sequences=14, per_device_batch_size=2)
    trainer = L.Trainer(
        max_epochs=2,
        accumulate_grad_batches=3,
        limit_train_batches=5,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    assert trainer.global_step == 4
    for window in (slice(0, 3), slice(3, 5), slice(5, 8), slice(8, 10)):
        batches = module.batches[window]
        tokens = sum(int((batch.student.labels[:, 1:] != -100).sum()) for batch in batches)
        for batch in batches:
            assert batch.units["tokens"] == tokens
            assert batch.units["micro_batches"] == len(batches)
    assert ids(module.batches[:5]) != ids(module.batches[5:])
    assert module.validated == 2 * ids(data.val_dataloader())
    assert np.unique(module.validated, axis=0).shape[0] == len(data.validation_rows)
