"""The fused head: lm_head computes the loss inside its own call, and returns zero-width logits.

FSDP and ZeRO-3 keep lm_head's weight whole during lm_head's own call and at no other time, and
learn from that call's output when its backward begins. Hence, while a model trains with labels:

    forward pre-hook on the model   leaves labels and token count in a note on lm_head
    lm_head                         puts the loss in the note, returns loss.expand(B, T, 0)
    the model                       slices or scales the logits: nothing happens to them
    loss_function                   returns loss + logits.sum()

The sum is 0, and makes every hook on lm_head's output run in backward, before lm_head's own node.
"""

import inspect
import itertools
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liger_core import LabelScan, cross_entropy, linear_cross_entropy
from liger_core.ops.labels import IGNORE_INDEX
from liger_kernel.config import LigerConfig

WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


@dataclass(slots=True)
class Note:
    """What one call of the model and its lm_head tell each other. Empty between calls.

    Tensors only: torch.compile would specialise on a number kept here, and recompile every step.
    """

    y: Tensor | None = None
    total: Tensor | None = None
    scan: LabelScan | None = None
    loss: Tensor | None = None

    def clear(self) -> None:
        self.y = self.total = self.scan = self.loss = None


class Ticket:
    """What lm_head holds in place of its note; a copy of the module gets a ticket of its own.

    The notes themselves are kept here: torch.compile takes a tensor that hangs on a module to have
    one shape for ever, and would recompile for every length of the labels.
    """

    def __init__(self) -> None:
        self.number = next(_numbers)
        _notes[self.number] = Note()
        weakref.finalize(self, _notes.pop, self.number, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ticket":
        return Ticket()

    def __reduce__(self) -> tuple[type["Ticket"], tuple[()]]:
        return Ticket, ()


_notes: dict[int, Note] = {}
_numbers = itertools.count()


def noted(head: nn.Module | None) -> tuple[nn.Module, Note] | None:
    """The fused module whose output `head` returns and its note; None where there is none."""
    at: Any = head
    while at is not None:
        if (ticket := vars(at).get("_liger_ticket")) is not None:
            return at, _notes[ticket.number]
        inner = at._modules
        if "modules_to_save" in inner:  # PEFT; the condition is that of its own forward
            name = None if at.disable_adapters else next(iter(at.active_adapters), None)
            saved = inner["modules_to_save"]
            at = saved[name] if name in saved else inner["original_module"]
        else:
            at = next((inner[name] for name in WRAPPERS if name in inner), None)
    return None


def leave_note(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of the model."""
    kwargs = dict(kwargs)
    skip_logits = kwargs.pop("skip_logits", None)
    y, labels = kwargs.get("shift_labels"), _labels(model, args, kwargs)
    if y is None and labels is not None:
        y = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
    elif y is not None and labels is None:
        kwargs["labels"] = y  # or the model would not call loss_function
    if getattr(model, "_is_replica", False):
        raise RuntimeError(
            "nn.DataParallel shares one patched model among its GPUs' threads; start one process a "
            "GPU with torchrun or accelerate launch, or show one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    # Trainer asks for no logits and takes the labels out where a loss of its own needs logits
    fuse = y is not None and (model.training if skip_logits is None else skip_logits)
    if (found := noted(model.get_output_embeddings())) is None:  # pyright: ignore
        if fuse:
            warnings.warn(
                "lm_head was wrapped after it was patched, so that it cannot compute the loss "
                "itself: full logits are made. Patch the model last.",
                stacklevel=2,
            )
        return args, kwargs
    head, note = found
    note.clear()  # whatever a call that raised has left
    if y is not None and fuse:
        note.y, note.total = y, _total(y, kwargs.get("num_items_in_batch"))
        if not torch.compiler.is_compiling():
            note.scan = LabelScan(y, head.out_features)  # pyright: ignore
    return args, kwargs


def _labels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    if "labels" in kwargs or not args:
        return kwargs.get("labels")
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    at = names.index("labels") if "labels" in names else len(args)
    return args[at] if at < len(args) else None


def _total(y: Tensor, total: Tensor | float | None) -> Tensor | None:
    if isinstance(total, Tensor):
        return total.reshape(()).to(y.device)
    return None if total is None else torch.full((), total, dtype=torch.float32, device=y.device)


def forward(
    head: nn.Linear, below: Callable[[Tensor], Tensor] | None, config: LigerConfig, x: Tensor
) -> Tensor:
    """Replaces lm_head's forward. `below` is the instance's own one, where it had one."""
    note = _notes[vars(head)["_liger_ticket"].number]
    if (y := note.y) is None:
        return type(head).forward(head, x) if below is None else below(x)
    total, scan = note.total, note.scan
    note.clear()
    if x.shape[:-1] != y.shape:
        raise ValueError(
            f"labels must have shape {tuple(x.shape[:-1])}, as lm_head's input (logits_to_keep "
            f"cuts the logits, not the labels), got {tuple(y.shape)}"
        )
    note.loss = linear_cross_entropy(
        x,
        head.weight,
        y.to(x.device),
        head.bias,
        total=None if total is None else total.to(x.device),
        labels=scan if y.device == x.device else None,
        memory_budget=config.memory_budget,
        accum_dtype=None if config.accum_dtype is None else getattr(torch, config.accum_dtype),
        impl=config.impl,
    )
    return note.loss.to(x.dtype).expand(*x.shape[:-1], 0)


def loss_function(
    model: nn.Module, config: LigerConfig, original: Callable[..., Tensor],
    logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Replaces the model's `loss_function`."""
    found = noted(model.get_output_embeddings())  # pyright: ignore
    if found is not None and (loss := found[1].loss) is not None:
        found[1].loss = None
        return loss + logits.sum()
    if not config.cross_entropy:
        return original(logits, labels, *args, **kwargs)
    return causal_lm_loss(
        logits, labels, kwargs.get("num_items_in_batch"), kwargs.get("shift_labels"), config
    )


def causal_lm_loss(
    logits: Tensor, labels: Tensor, total: Tensor | float | None, shifted: Tensor | None,
    config: LigerConfig,
) -> Tensor:  # fmt: skip
    """Cross entropy of full logits (B, T, V): mean over scored labels, or their sum / total."""
    y = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:] if shifted is None else shifted
    y = y.to(logits.device)
    reduction = "mean" if total is None else "sum"
    return cross_entropy(logits, y, reduction=reduction, total=_total(y, total), impl=config.impl)


def own_forward(module: nn.Module) -> str:
    """The attribute that a replacement goes to: accelerate's hooks keep what they wrap apart."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def _sites(head: nn.Module) -> list[nn.Linear]:
    """The plain linear modules that may be the head's own product."""
    inner: Any = head._modules
    if "modules_to_save" in inner:
        return [*_sites(inner["original_module"]), *_sites(inner["modules_to_save"])]
    if isinstance(head, nn.ModuleDict):
        return [site for module in head.values() for site in _sites(module)]
    if (name := next((n for n in WRAPPERS if n in inner), None)) is not None:
        return _sites(inner[name])
    return [head] if type(head) is nn.Linear else []


def fuse(patch: Any, model: nn.Module, config: LigerConfig) -> str | None:
    """Fuse the model's head into `patch`, or say why not. Without `fused_head`: its loss alone."""
    if not (config.fused_head or config.cross_entropy):
        return None
    head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        return "the model has no language-model head"
    original: Any = model.loss_function
    if getattr(original, "__name__", "") != "ForCausalLMLoss":
        return f"the model's loss is {getattr(original, '__name__', original)}, not ForCausalLMLoss"
    if config.fused_head:
        if not (sites := _sites(head)):
            return f"{type(head).__name__} is more than a matrix product"
        paths = {module: path for path, module in model.named_modules()}
        for site in sites:
            patch.set(site, "_liger_ticket", Ticket())
            replacement = partial(forward, site, vars(site).get(own_forward(site)), config)
            patch.replace(paths[site], site, replacement, "fused linear cross entropy")
        patch.undo(model.register_forward_pre_hook(leave_note, with_kwargs=True).remove)
    if config.cross_entropy:
        patch.record("", model, "cross entropy")
    patch.set(model, "_loss_function", partial(loss_function, model, config, original))
    return None
