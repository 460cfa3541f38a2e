"""A callback that turns a clock of the test's own, so that what happens by the clock happens at a known place."""

from lightning.pytorch.callbacks import Callback


class Clock(Callback):
    """Ten seconds a micro-batch, a hundred a validation batch."""

    now = 1000.0

    def on_train_batch_start(self, *args):
        Clock.now += 10

    def on_validation_batch_start(self, *args):
        Clock.now += 100
