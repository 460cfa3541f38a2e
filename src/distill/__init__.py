"""Student-aware knowledge distillation of causal language models in one LightningCLI program."""

__version__ = "0.1.0"
