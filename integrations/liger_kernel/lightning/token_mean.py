"""TokenMean: gradient accumulation that weighs tokens alike, whatever their numbers."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from liger_kernel.lightning.models import trained_within
from liger_kernel.lightning.namespaces import bases
from liger_kernel.transformers.head import labels_given

IGNORE_INDEX = -100


class TokenMean(*bases("callbacks", "Callback")):  # pyright: ignore
    """Steps with the gradient of the mean over all scored tokens of a window, of all processes.

        Trainer(accumulate_grad_batches=8, callbacks=[TokenMean()])

    Lightning takes the mean of the batches' means, over `accumulate_grad_batches` even where an
    epoch ends in the middle of a window, and the mean of that over the processes. With this, the
    model divides a batch's sum of losses by one number for the whole run (`num_items_in_batch`, a
    power of two near a batch's positions), and before a step the gradients are brought to the
    tokens that there really were: one sum of one number over the processes, and no wait for the
    device. Clipping comes after it; callbacks that look at gradients before a step should, too.

    The loss that `training_step` sees is the batch's sum over `divisor`, not the batch's mean.

    Raises:
        ValueError: when training begins: not one causal language model to train, one whose loss
            has auxiliary terms, manual optimisation, or DeepSpeed, which does not show its
            gradients. At a step: no labels have reached the model.
    """

    divisor: Tensor | None = None
    _hook: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Have the model told what to divide by."""
        self._remove()
        models = trained_within(pl_module)
        kinds = {cls.__name__ for cls in type(trainer.strategy).__mro__}
        if len(models) != 1:
            raise ValueError(f"TokenMean needs one transformers model to train, got {len(models)}")
        if (why := _unfit(models[0])) is not None:
            raise ValueError(f"TokenMean is for causal language models; {why}")
        if not pl_module.automatic_optimization:
            raise ValueError("TokenMean needs automatic_optimization")
        if "DeepSpeedStrategy" in kinds:
            raise ValueError("TokenMean cannot reach DeepSpeed's gradients")
        self.divisor = None
        self._window = torch.zeros((), dtype=torch.int64, device=pl_module.device)
        self._pending = torch.zeros_like(self._window)
        self._hook = models[0].register_forward_pre_hook(
            self._tell, with_kwargs=True, prepend=True
        )  # before the patch's own, which reads it

    def _tell(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        y = kwargs.get("shift_labels")
        if y is None and (labels := labels_given(model, args, kwargs)) is not None:
            y = labels[..., 1:]
        if y is None or not torch.is_grad_enabled():
            return None
        if self.divisor is None:
            positions, processes = _sum(torch.full_like(self._window, y.numel()))
            mean = positions / processes
            # A power of two, so that no bit depends on the batch that it comes from, which is
            # another after a resume; an integer, which mixed precision leaves alone.
            self.divisor = (mean / torch.frexp(mean).mantissa).clamp_min(1).long()
        self._pending += (y != kwargs.get("ignore_index", IGNORE_INDEX)).sum()
        return args, kwargs | {"num_items_in_batch": self.divisor}

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Count what has a gradient: a batch may be left out of training."""
        self._window += self._pending
        self._pending.zero_()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, at: int) -> None:
        """Forget what had none."""
        self._pending.zero_()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Bring the gradients to the mean: loss scaler and processes are done with them."""
        if self.divisor is None:
            raise ValueError("TokenMean has seen no labels: give the model its labels")
        total, processes = _sum(self._window.clone())
        factor = self.divisor * trainer.accumulate_grad_batches * processes / total.clamp_min(1)
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(factor)
        self._window.zero_()

    def _remove(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Have the model as it was."""
        self._remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Have the model as it was; the error goes on."""
        self._remove()


def _unfit(model: Any) -> str | None:
    """Why a model's loss is not the sum over scored tokens, by `num_items_in_batch`, or None."""
    name = type(model).__name__
    if LOSS_MAPPING.get(model.loss_type) is not ForCausalLMLoss or model.config.is_encoder_decoder:
        return f"{name} has another loss"
    if not getattr(model, "accepts_loss_kwargs", True):
        return f"{name} takes no num_items_in_batch"
    if getattr(model.config, "output_router_logits", False):
        return f"{name} adds a loss of its routers, which is no sum over tokens"
    return None


def _sum(t: Tensor) -> tuple[Tensor, int]:
    """The sum over all processes, in place, and how many these are."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return t, 1
    dist.all_reduce(t)
    return t, dist.get_world_size()
