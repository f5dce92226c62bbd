"""LigerCallback: the patch for a Trainer whose model and arguments are somebody else's."""

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from liger_kernel.config import LigerConfig
from liger_kernel.measure import Meter
from liger_kernel.transformers.patch import Patch, apply

PREFIX = "liger_"  # of its figures among Trainer's metrics


class LigerCallback(TrainerCallback):
    """Patches a Trainer's model, says what was patched, and measures the run.

        Trainer(model, args, callbacks=[LigerCallback({"rope": False})], ...)

    The patch comes when the Trainer is made, or when training begins for a model that
    `model_init` makes anew and for a callback that is added later. Trainer's arguments stay as they
    are, so that evaluation makes logits, which `use_liger` spares where the loss is enough.

    What `train()` returns, and the last entry of the log, have `liger_tokens_per_second`, of this
    process without its first step, evaluation and checkpoints, and `liger_peak_memory_mib`, see
    `liger_kernel.measure.Meter`. Process zero prints both and what was patched.

    Args:
        config: what `LigerConfig.of` takes.

    Raises:
        ValueError: as `liger_kernel.transformers.apply` does, or where the arguments have
            `use_liger_kernel` with another configuration.
    """

    def __init__(self, config: LigerConfig | Mapping[str, Any] | str | None = None) -> None:
        self.config = LigerConfig.of(config)
        self.patch: Patch | None = None
        self.meter: Meter | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._apply(args, state, kwargs["model"])

    def _apply(self, args: Any, state: Any, model: Any) -> None:
        if args.use_liger_kernel:
            theirs = LigerConfig.of(args.liger_kernel_config)
            if theirs != self.config:
                raise ValueError(f"the arguments have {theirs}, LigerCallback {self.config}")
        patch = apply(model, self.config)
        if patch is not self.patch and state.is_world_process_zero:
            print(patch, flush=True)
        self.patch = patch

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._apply(args, state, kwargs["model"])
        if self.meter is not None:
            self.meter.remove()  # of a run that broke off
        self.meter = Meter(kwargs["model"], args.device)
        self.first = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.meter is not None and not self.first:
            self.meter.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.meter is None:
            return
        if self.first:
            self.first = False
            self.meter.reset()
            self.meter.start()
        if control.should_evaluate or control.should_save:
            self.meter.stop()

    on_epoch_end = on_step_end

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if self.meter is not None and "train_runtime" in logs:  # the last, of the whole run
            found = {PREFIX + name: value for name, value in self.meter.close().items()}
            self.meter = None
            logs.update(found)
            state.log_history[-1].update(found)
            if state.is_world_process_zero:
                print("liger:", ", ".join(f"{k}={v:.1f}" for k, v in found.items()), flush=True)
