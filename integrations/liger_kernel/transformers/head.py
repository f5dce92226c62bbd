"""The fused head: lm_head computes the loss inside its own call, and returns zero-width logits.

FSDP and ZeRO-3 keep lm_head's weight whole during lm_head's own call and at no other time, and
learn from that call's output when its backward begins. Hence, while a model trains with labels:

    forward pre-hook on the model   leaves labels and token count in a note on lm_head
    lm_head                         puts the loss in the note, returns loss.expand(B, T, 0)
    the model                       slices, scales or caps the logits: nothing happens to them
    loss_function                   returns loss + logits.sum()
    forward hook on the model       adds what was asked for besides to the outputs

The sum is 0, and makes every hook on lm_head's output run in backward, before lm_head's own node.
Whether the model scales or caps its logits is the recipe's to know; `loss_function` checks it.
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

from liger_core import (
    LabelScan,
    cross_entropy,
    linear_cross_entropy,
    linear_cross_entropy_stats,
)
from liger_core.ops.labels import IGNORE_INDEX
from liger_kernel.config import LigerConfig
from liger_kernel.transformers.recipes import Recipe

WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
STATS = {"return_token_accuracy": "token_accuracy", "return_predicted_tokens": "predicted_tokens"}


@dataclass(slots=True)
class Note:
    """What one call of the model and its lm_head tell each other. Empty between calls.

    Numbers are tensors: torch.compile would specialise on others, and recompile every step.
    """

    y: Tensor | None = None
    fuse: bool = False
    total: Tensor | None = None
    scan: LabelScan | None = None
    token_scaling: bool = False
    accum_dtype: torch.dtype | None = None
    wanted: tuple[str, ...] = ()  # names of outputs
    logits: Tensor | None = None  # what lm_head has returned
    loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None

    def clear(self) -> None:
        self.__init__()


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
        if (ticket := at.__dict__.get("_liger_ticket")) is not None:
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
    """Forward pre-hook of the model. What it takes out of kwargs is upstream's, not the model's."""
    kwargs = dict(kwargs)
    skip_logits = kwargs.pop("skip_logits", None)
    token_scaling, accum = kwargs.pop("use_token_scaling", False), kwargs.pop("accum_dtype", None)
    wanted = tuple(name for flag, name in STATS.items() if kwargs.pop(flag, False))
    y, labels = kwargs.get("shift_labels"), _labels(model, args, kwargs)
    if y is None and labels is not None:
        y = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
    elif y is not None and labels is None:
        kwargs["labels"] = y  # or the model would not call loss_function
    # Trainer asks for no logits and takes the labels out where a loss of its own needs logits
    fuse = y is not None and (model.training if skip_logits is None else skip_logits)
    if (found := _find(model)) is None:
        if fuse:
            warnings.warn(
                "lm_head was wrapped after it was patched, so that it cannot compute the loss "
                "itself: full logits are made. Patch the model last.",
                stacklevel=2,
            )
        return args, kwargs
    _, note = found
    note.clear()  # whatever a call that raised has left
    note.y, note.wanted, note.fuse = y, wanted if y is not None else (), fuse
    if fuse and y is not None:
        note.total = _total(y, kwargs.get("num_items_in_batch"))
        note.token_scaling, note.accum_dtype = token_scaling, accum
        if not torch.compiler.is_compiling():
            note.scan = LabelScan(y, _linear(found[0]).out_features)
    elif token_scaling and y is not None:
        raise ValueError("use_token_scaling needs the fused head: train, or pass skip_logits=True")
    return args, kwargs


def _find(model: nn.Module) -> tuple[nn.Module, Note] | None:
    """`noted` of the model's head, which is fused again where it has changed since."""
    head: Any = model.get_output_embeddings()  # pyright: ignore
    found = noted(head)
    if found is None and not torch.compiler.is_compiling():
        _fit(vars(model)["_liger_patch"], head)
        found = noted(head)
    return found


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
    head: nn.Module, model_config: Any, recipe: Recipe, config: LigerConfig,
    x: Tensor, *args: Any, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Replaces lm_head's forward: a linear layer's, or that of PEFT's LoRA around one."""
    note = _notes[head.__dict__["_liger_ticket"].number]
    options = _options(head, x, *args, **kwargs) if note.fuse else None
    if (y := note.y) is None or options is None:
        return type(head).forward(head, x, *args, **kwargs)
    note.fuse = False
    if x.shape[:-1] != y.shape:
        note.clear()
        raise ValueError(
            f"labels must have shape {tuple(x.shape[:-1])}, as lm_head's input (logits_to_keep "
            f"cuts the logits, not the labels), got {tuple(y.shape)}"
        )
    accum = note.accum_dtype or config.accum_dtype
    out = (linear_cross_entropy_stats if note.wanted else linear_cross_entropy)(
        x,
        _linear(head).weight,
        y.to(x.device),
        total=None if note.total is None else note.total.to(x.device),
        token_scaling=note.token_scaling,
        softcap=getattr(model_config, recipe.softcap or "", None),
        scale=1 / getattr(model_config, recipe.logits_divided_by or "", 1.0),
        labels=note.scan if y.device == x.device else None,
        memory_budget=config.memory_budget,
        accum_dtype=getattr(torch, accum) if isinstance(accum, str) else accum,
        impl=config.impl,
        **options,
    )
    if isinstance(out, Tensor):
        note.loss = out
    else:
        note.loss, _, note.token_accuracy, note.predicted_tokens = out
    note.logits = note.loss.to(x.dtype).expand(*x.shape[:-1], 0)
    return note.logits


def _linear(head: Any) -> nn.Linear:
    return head if type(head) is nn.Linear else head.base_layer


def _options(head: Any, x: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any] | None:
    """Bias and LoRA of the head, as PEFT's forward has them; None where they are more than that."""
    base = _linear(head)
    if base is head or head.merged or head.disable_adapters:
        return (
            None if base is not head and head.merged and head.disable_adapters else {"b": base.bias}
        )
    active = [name for name in head.active_adapters if name in head.lora_A]
    if kwargs or args or any(name in head.lora_variant for name in active):
        return None
    b, us, vs = base.bias, [], []
    for name in active:
        A, B, s = head.lora_A[name], head.lora_B[name], head.scaling[name]
        u = A(head.lora_dropout[name](head._cast_input_dtype(x, A.weight.dtype))) * s
        us.append(u.to(x.dtype))
        vs.append(B.weight.to(base.weight.dtype))
        if B.bias is not None:
            b = b + (B.bias * s).to(b.dtype)
    return {"b": b} | ({"low_rank": (torch.cat(us, -1), torch.cat(vs, -1))} if us else {})


def loss_function(
    model: nn.Module, config: LigerConfig, recipe: Recipe, original: Callable[..., Tensor],
    logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Replaces the model's `loss_function`."""
    found = noted(model.get_output_embeddings())  # pyright: ignore
    if found is not None and (loss := found[1].loss) is not None:
        ours, found[1].loss, found[1].logits = found[1].logits, None, None
        if not (recipe.softcap or recipe.logits_divided_by) and (op := _changed(logits, ours)):
            raise RuntimeError(
                f"{type(model).__name__} changes the logits after its head ({op}), which the fused "
                f"head does not know of; pass fused_head=False"
            )
        return loss + logits.sum()
    if not config.cross_entropy:
        return original(logits, labels, *args, **kwargs)
    return causal_lm_loss(
        logits, labels, kwargs.get("num_items_in_batch"), kwargs.get("shift_labels"), config
    )


UNCHANGED = ("ToCopy", "View", "Slice", "Alias", "Expand", "Clone", "Unsqueeze", "Squeeze")


def _changed(logits: Tensor, ours: Tensor | None) -> str:
    """The autograd operation between what the head returned and what the loss is given, or ""."""
    if torch.compiler.is_compiling() or ours is None or logits is ours:
        return ""
    at, end = logits.grad_fn, ours.grad_fn
    while at is not None and at is not end:
        op = at.name().removeprefix("Unsafe")
        if op.endswith("0") and not op.startswith(UNCHANGED):  # others are engines' own
            return op
        at = at.next_functions[0][0] if at.next_functions else None
    return ""


def add_stats(model: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of the model: the outputs that `wanted` names."""
    if (found := noted(model.get_output_embeddings())) is None:  # pyright: ignore
        return
    note = found[1]
    if note.wanted and hasattr(output, "logits"):
        if note.predicted_tokens is None and note.y is not None:  # of logits that were made
            best, scored = output.logits.argmax(-1), note.y != IGNORE_INDEX
            note.predicted_tokens = best.masked_fill(~scored, -1)
            hits = ((best == note.y) & scored).sum()
            note.token_accuracy = hits / scored.sum().clamp_min(1)
        for name in note.wanted:
            setattr(output, name, getattr(note, name))
    note.clear()


def causal_lm_loss(
    logits: Tensor, labels: Tensor, total: Tensor | float | None, shifted: Tensor | None,
    config: LigerConfig,
) -> Tensor:  # fmt: skip
    """Cross entropy of full logits (B, T, V): mean over scored labels, or their sum / total."""
    y = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:] if shifted is None else shifted
    y = y.to(logits.device)
    reduction = "mean" if total is None else "sum"
    return cross_entropy(logits, y, reduction=reduction, total=_total(y, total), impl=config.impl)


def _sites(head: nn.Module) -> list[nn.Module]:
    """The modules that may be the head's own product: plain linears, LoRA around one."""
    inner: Any = head._modules
    if "modules_to_save" in inner:
        return [*_sites(inner["original_module"]), *_sites(inner["modules_to_save"])]
    if isinstance(head, nn.ModuleDict):
        return [site for module in head.values() for site in _sites(module)]
    if (name := next((n for n in WRAPPERS if n in inner), None)) is not None:
        return _sites(inner[name])
    lora = type(head).__module__ == "peft.tuners.lora.layer" and type(head).__name__ == "Linear"
    plain = type(inner.get("base_layer") if lora else head) is nn.Linear
    return [head] if plain and not getattr(head, "fan_in_fan_out", False) else []


def _fit(patch: Any, head: nn.Module) -> str | None:
    """Put the fused forward into the head as it is now, or say why not."""
    if not (sites := _sites(head)):
        return f"{type(head).__name__} is more than a matrix product"
    paths = {module: path for path, module in patch.model.named_modules()}
    for site in sites:
        if "_liger_ticket" not in vars(site):
            new = partial(forward, site, patch.model.config, patch.recipe, patch.config)
            patch.replace(paths[site], site, new, "fused linear cross entropy")
            patch.set(site, "_liger_ticket", Ticket())
    return None


def _calls_loss_function(model: nn.Module) -> bool:
    """Whether the forward of the model's class asks `self.loss_function` for the loss."""
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return code is not None and "loss_function" in code.co_names


def fuse(patch: Any) -> str | None:
    """Fuse the head of the patch's model, or say why not. Without `fused_head`: its loss alone."""
    model, config = patch.model, patch.config
    if not (config.fused_head or config.cross_entropy):
        return None
    head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        return "the model has no language-model head"
    original: Any = model.loss_function
    if getattr(original, "__name__", "") != "ForCausalLMLoss":
        return f"the model's loss is {getattr(original, '__name__', original)}, not ForCausalLMLoss"
    if not _calls_loss_function(model):
        return f"the forward of {type(model).__name__} computes its loss itself"
    if config.fused_head:
        if (why := _fit(patch, head)) is not None:
            return why
        patch.undo(model.register_forward_pre_hook(leave_note, with_kwargs=True).remove)
        patch.undo(model.register_forward_hook(add_stats).remove)
    if config.cross_entropy:
        patch.record("", model, "cross entropy")
    loss = partial(loss_function, model, config, patch.recipe, original)
    patch.set(model, "_loss_function", loss)
    return None
