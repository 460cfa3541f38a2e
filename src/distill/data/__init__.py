"""Text data as batches that carry the unit counts of their optimizer step."""

from distill.data.datamodule import DistillationDataModule

__all__ = ["DistillationDataModule"]
