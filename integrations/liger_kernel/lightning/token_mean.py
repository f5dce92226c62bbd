"""TokenMean: gradient accumulation that weighs tokens alike, whatever their numbers."""

from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel.lightning.models import trained_within
from liger_kernel.lightning.namespaces import bases

IGNORE_INDEX = -100


class TokenMean(*bases("callbacks", "Callback")):  # pyright: ignore
    """Steps with the gradient of the mean over all scored tokens of a window, of all processes.

        Trainer(accumulate_grad_batches=8, callbacks=[TokenMean()])

    Lightning takes the mean of the batches' means, over `accumulate_grad_batches` even where an
    epoch ends in the middle of a window, and the mean of that over the processes. With this, the
    model divides a batch's sum of losses by one number for the whole run (`num_items_in_batch`, of
    the size of a batch's tokens), and before a step the gradients are brought to the tokens that
    there really were: one sum of one number over the processes, no wait for the device. Without
    accumulation the right number is known in time, and goes to the model at once.

    The loss that `training_step` sees is the batch's sum over that number, not the batch's mean.
    The module has one transformers model with something to train, calls it once a batch with
    `labels` or `shift_labels`, and leaves the optimisation to Lightning.

    Raises:
        ValueError: when training begins: a module that is otherwise, or DeepSpeed with
            accumulation, which does not show its gradients.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Have the model told what to divide by."""
        models = trained_within(pl_module)
        kinds = {cls.__name__ for cls in type(trainer.strategy).__mro__}
        self._many = trainer.accumulate_grad_batches > 1
        if len(models) != 1:
            raise ValueError(f"TokenMean needs one transformers model to train, got {len(models)}")
        if not pl_module.automatic_optimization:
            raise ValueError("TokenMean needs automatic_optimization")
        if self._many and "DeepSpeedStrategy" in kinds:
            raise ValueError("TokenMean cannot reach DeepSpeed's gradients; accumulate by 1")
        self._trainer: Any = trainer
        self._unit: Tensor | None = None
        self._window = torch.zeros((), dtype=torch.float32, device=pl_module.device)
        self._hook = models[0].register_forward_pre_hook(
            self._tell, with_kwargs=True, prepend=True
        )  # before the patch's own, which reads it

    def _tell(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        y = kwargs.get("shift_labels")
        if y is None and kwargs.get("labels") is not None:
            y = kwargs["labels"][..., 1:]
        if y is None or not (model.training and torch.is_grad_enabled()):
            return None
        scored = (y != IGNORE_INDEX).sum().to(self._window)
        if not self._many or self._unit is None:
            mean = self._trainer.strategy.reduce(scored, reduce_op="mean").clamp_min(1)
            # of a window: a power of two, so that no bit depends on the batch that it comes from,
            # which after a resume is another
            self._unit = mean / torch.frexp(mean).mantissa if self._many else mean
        self._window += scored
        return args, kwargs | {"num_items_in_batch": self._unit}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Bring the gradients to the mean: loss scaler and processes are done with them."""
        if not self._many or self._unit is None:
            return
        total = trainer.strategy.reduce(self._window, reduce_op="sum").clamp_min(1)
        factor = self._unit * trainer.accumulate_grad_batches * trainer.world_size / total
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(factor)
        self._window.zero_()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Have the model as it was."""
        self._hook.remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Have the model as it was; the error goes on."""
        if hasattr(self, "_hook"):
            self._hook.remove()
