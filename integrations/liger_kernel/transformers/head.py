"""The fused head: lm_head computes the loss inside its own call, and returns zero-width logits.

FSDP and ZeRO-3 keep lm_head's weight whole during lm_head's own call and at no other time, and
learn from that call's output when its backward begins. Hence, while a model trains with labels:

    forward pre-hook on the model   leaves labels and token count in a note on lm_head
    lm_head                         puts the loss in the note, returns loss.expand(B, T, 0)
    the model                       slices, scales or caps the logits: nothing happens to them
    loss_function                   returns loss + logits.sum()
    forward hook on the model       adds what was asked for besides to the outputs

The sum is 0, and makes every hook on lm_head's output run in backward, before lm_head's own node.
Scales and caps are the recipe's to know. `loss_function` raises where the model has done anything
else to the logits or asks for another loss than the head has computed.
"""

import inspect
import re
import types
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

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
from liger_core.ops.reduction import CrossEntropyStats
from liger_core.ops.sharded import is_dtensor
from liger_kernel import together
from liger_kernel.config import LigerConfig
from liger_kernel.transformers.engines import (
    check_tied,
    gather,
    is_linear,
    like_input,
    skip_gather,
    split_by_engine,
)
from liger_kernel.transformers.layers import calls
from liger_kernel.transformers.lora import added, inner, linear, sites
from liger_kernel.transformers.note import Answer, Note, Ticket, note_of
from liger_kernel.transformers.recipes import Recipe

if TYPE_CHECKING:
    from liger_kernel.transformers.patch import Patch

STATS = {"return_token_accuracy": "token_accuracy", "return_predicted_tokens": "predicted_tokens"}
HARMLESS = re.compile(  # autograd nodes: views and casts; DeepSpeed's and DTensor's own
    r"(ToCopy|(Unsafe)?View|Alias|Expand|Clone|Unsqueeze|Squeeze)Backward\d"
    r"|.*(PreBackward|PostBackward|TorchTensor|Redistribute).*"
)


def noted(head: Any) -> tuple[nn.Module, Note] | None:
    """The fused module whose output `head` returns and its note; None where there is none."""
    while head is not None and (under := inner(head)) is not None:
        head = under
    if head is None or not (is_linear(head) or "base_layer" in head._modules):
        return None
    note = note_of(head)
    return None if note is None else (head, note)


def leave_note(
    recipe: Recipe, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Forward pre-hook of the model. What it takes out of kwargs is upstream's, not the model's."""
    kwargs = dict(kwargs)
    skip_logits = kwargs.pop("skip_logits", None)
    token_scaling, accum = kwargs.pop("use_token_scaling", False), kwargs.pop("accum_dtype", None)
    wanted = tuple(name for flag, name in STATS.items() if kwargs.pop(flag, False))
    ignore_index = kwargs.get("ignore_index", IGNORE_INDEX)
    y, labels = kwargs.get("shift_labels"), labels_given(model, args, kwargs)
    shifted = y is not None
    if y is None and labels is not None:
        y = _shift(labels, ignore_index)
    elif y is not None and labels is None:
        kwargs["labels"] = y  # or the model would not call loss_function
    # Trainer asks for no logits and takes the labels out where a loss of its own needs logits
    fuse = y is not None and (model.training if skip_logits is None else skip_logits)
    found, why = _fused(model)
    if found is None:
        if fuse:
            warnings.warn(f"{why}: full logits are made. Patch the model last.", stacklevel=2)
        return args, kwargs
    head, note = found
    note.clear()  # whatever a call that raised has left
    if y is None:
        if model.training and torch.is_grad_enabled():
            _without_labels(vars(model)["_liger_patch"].config, note)
        return args, kwargs
    note.labels, note.shifted = kwargs["shift_labels"] if shifted else labels, shifted
    note.y, note.wanted, note.fuse, note.ignore_index = y, wanted, fuse, ignore_index
    if fuse:
        config: Any = model.config
        note.softcap = getattr(config, recipe.softcap or "", None)
        note.divisor = getattr(config, recipe.logits_divided_by or "", 1.0)
        note.total = _total(y, kwargs.get("num_items_in_batch"))
        note.token_scaling, note.accum_dtype = token_scaling, accum
        if not torch.compiler.is_compiling():
            together.watch()
            note.scan = LabelScan(y, linear(head).out_features, ignore_index)
    elif token_scaling:
        raise ValueError("use_token_scaling needs the fused head: train, or pass skip_logits=True")
    elif skip_logits is None and torch.is_grad_enabled():
        _say_unfused(note, "the model is in eval mode, as from_pretrained leaves it; call train()")
    return args, kwargs


def _fused(model: nn.Module) -> tuple[tuple[nn.Module, Note] | None, str]:
    """`noted` of the model's head, which is fused anew where it has changed, or why it is not."""
    head: Any = model.get_output_embeddings()  # pyright: ignore
    found = noted(head)
    if torch.compiler.is_compiling():
        return found, "lm_head was wrapped after it was patched"
    if head is not None:
        check_tied(model, head)
    loss = vars(model).get("_loss_function")
    if getattr(loss, "func", None) is not loss_function:
        return None, "loss_function was set after the model was patched"
    if found is None and head is not None:
        fuse_sites(vars(model)["_liger_patch"], head)
        found = noted(head)
    return found, "lm_head was wrapped after it was patched, and cannot compute the loss itself"


def _without_labels(config: LigerConfig, note: Note) -> None:
    """A call in training whose loss is somebody else's: full logits will be made."""
    if config.label_smoothing:
        raise ValueError(
            "liger_config's label_smoothing is for a model that is given its labels: this call has "
            "none (compute_loss_func and label_smoothing_factor keep them)"
        )
    _say_unfused(
        note,
        "no labels reach the model (compute_loss_func and label_smoothing_factor keep them); "
        "fused_head=False if so intended",
    )


def _say_unfused(note: Note, why: str) -> None:
    if not (note.unfused or torch.compiler.is_compiling()):
        warnings.warn(f"lm_head makes full logits, with a gradient: {why}", stacklevel=4)


def labels_given(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The labels of a call of the model, by keyword or position."""
    if "labels" in kwargs or not args:
        return kwargs.get("labels")
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    at = names.index("labels") if "labels" in names else len(args)
    return args[at] if at < len(args) else None


def _shift(labels: Tensor, ignore_index: int) -> Tensor:
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _total(y: Tensor, total: Tensor | float | None) -> Tensor | None:
    if isinstance(total, Tensor):
        if total.is_floating_point() and total.dtype.itemsize < 4:
            raise ValueError(
                f"num_items_in_batch is {total.dtype}, which rounds counts; pass an integer, as "
                f"mixed-precision policies of FSDP cast floating inputs"
            )
        return total.reshape(()).to(y.device)
    return None if total is None else torch.full((), total, dtype=torch.float32, device=y.device)


def forward(
    head: nn.Module, config: LigerConfig, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor | Answer:
    """Replaces lm_head's forward: a linear layer's, or that of PEFT's LoRA around one."""
    note = note_of(head)
    asked = note is not None and (note.fuse or note.request is not None)
    options = added(head, x, *args, **kwargs) if asked else None
    w = linear(head).weight if options is not None else None
    # transformers' tensor parallelism hides from no_grad calls that the weight is a part
    whole = w is not None and w.shape[0] == linear(head).out_features
    if note is None or options is None or w is None or not whole:
        if note is not None and note.request is not None:
            note.clear()
            raise RuntimeError(
                f"{type(head).__name__} is more than a matrix product here (adapters by row or as "
                f"FSDP1 units, hooks, DoRA, or tensor parallelism without a gradient): leave "
                f"lm_head without adapters, or turn use_liger_loss off"
            )
        if note is not None and torch.is_grad_enabled():
            note.unfused = True
            gather(head)
        return type(head).forward(head, x, *args, **kwargs)
    request, note.request, note.fuse = note.request, None, False
    try:
        if request is not None:
            return request(x, w, options)
        assert note.y is not None
        out = _loss(note, config, x, w, note.y, options)
    except ValueError as error:  # of this process's labels: the others are not to wait for it
        note.clear()
        if torch.is_grad_enabled():
            together.announce(error)
        raise
    if isinstance(out, Tensor):
        note.loss = out
    else:
        note.loss, _, note.token_accuracy, note.predicted_tokens = out
    if is_linear(head) and not note.unfused:
        skip_gather(head, note.loss)
    note.logits = like_input(note.loss.to(x.dtype).expand(*x.shape[:-1], 0), x)
    if not torch.compiler.is_compiling():
        note.version = note.logits._version
    return note.logits


def _loss(
    note: Note, config: LigerConfig, x: Tensor, w: Tensor, y: Tensor, options: dict[str, Any]
) -> Tensor | CrossEntropyStats:
    if x.shape[:-1] != y.shape:
        raise ValueError(
            f"labels must have shape {tuple(x.shape[:-1])}, as lm_head's input (logits_to_keep "
            f"cuts the logits, not the labels), got {tuple(y.shape)}"
        )
    accum = note.accum_dtype or config.accum_dtype
    return (linear_cross_entropy_stats if note.wanted else linear_cross_entropy)(
        x,
        w,
        y.to(x.device),
        total=None if note.total is None else note.total.to(x.device),
        token_scaling=note.token_scaling,
        ignore_index=note.ignore_index,
        softcap=note.softcap,
        scale=1 / note.divisor,
        label_smoothing=config.label_smoothing,
        labels=note.scan if y.device == x.device else None,
        memory_budget=config.memory_budget,
        accum_dtype=getattr(torch, accum) if isinstance(accum, str) else accum,
        impl=config.impl,
        **options,
    )


def loss_function(
    model: nn.Module, config: LigerConfig, recipe: Recipe, original: Callable[..., Tensor],
    logits: Tensor, labels: Tensor | None, vocab_size: int | None = None,
    num_items_in_batch: Tensor | float | None = None, ignore_index: int = IGNORE_INDEX,
    shift_labels: Tensor | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Replaces the model's `loss_function`, transformers' ForCausalLMLoss."""
    found = noted(model.get_output_embeddings())  # pyright: ignore
    if found is not None and (loss := found[1].loss) is not None and logits.shape[-1] == 0:
        head, note = found
        why = _another_loss(note, labels, shift_labels, num_items_in_batch, ignore_index)
        if vocab_size not in (None, linear(head).out_features):
            why = f"counts {vocab_size} classes of the head's {linear(head).out_features}"
        if why := why or _changed(note, recipe, logits):
            note.clear()
            raise RuntimeError(
                f"{type(model).__name__} {why}, which its fused head does not know of; "
                f"pass fused_head=False"
            )
        note.loss = note.logits = None
        logits = logits.to_local() if is_dtensor(logits) else logits  # pyright: ignore
        return loss + logits.sum(dtype=loss.dtype)
    logits = logits.full_tensor() if is_dtensor(logits) else logits  # pyright: ignore
    if not (config.cross_entropy or config.label_smoothing):
        return original(
            logits, labels, vocab_size, num_items_in_batch=num_items_in_batch,
            ignore_index=ignore_index, shift_labels=shift_labels, **kwargs,
        )  # fmt: skip
    if shift_labels is None and labels is not None:
        shift_labels = _shift(labels, ignore_index)
    assert shift_labels is not None
    y = shift_labels.to(logits.device)
    return cross_entropy(
        logits, y, reduction="mean" if num_items_in_batch is None else "sum",
        total=_total(y, num_items_in_batch), ignore_index=ignore_index,
        label_smoothing=config.label_smoothing, impl=config.impl,
    )  # fmt: skip


def _another_loss(
    note: Note, labels: Tensor | None, shift_labels: Tensor | None,
    total: Tensor | float | None, ignore_index: int,
) -> str:  # fmt: skip
    """In what the loss that the model asks for is not the one that the head has computed."""
    if ignore_index != note.ignore_index or (total is None) != (note.total is None):
        return "ignores another label or counts another way than it was told"
    if torch.compiler.is_compiling():
        return ""
    if shift_labels is not None:
        same, theirs = note.shifted and shift_labels is note.labels, shift_labels
    else:
        same = not note.shifted and labels is note.labels
        theirs = None if same or labels is None else _shift(labels, ignore_index)
    ours = note.y
    if not same and ours is not None and theirs is not None:
        same = torch.equal(ours, theirs.to(ours.device))
    return "" if same else "has other labels for its loss than it was given"


def _changed(note: Note, recipe: Recipe, logits: Tensor) -> str:
    """What has become of the logits since the head returned them, or ""."""
    ours = note.logits
    if torch.compiler.is_compiling() or ours is None or logits.grad_fn is None:
        if note.checked or logits is ours:
            return ""
        return "may change its logits, and without a step in eager mode first nobody can tell"
    capped, divided = note.softcap is not None, recipe.logits_divided_by is not None
    expected = ["Mul", "Tanh", "Div"] if capped else ["Div"] if divided else []
    at, end = logits.grad_fn, ours.grad_fn
    ops: list[str] = []
    while at is not None and at is not end:
        if not HARMLESS.fullmatch(at.name()):
            ops.append(at.name().removesuffix("Backward0"))
        at = at.next_functions[0][0] if at.next_functions else None
    if at is not end or ours._version != note.version:
        ops.append("an operation in place")
    if ops == expected:
        note.checked = True
        return ""
    return f"changes the logits after its head ({', '.join(ops) or 'not as usual'})"


def add_stats(model: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of the model: the outputs that `wanted` names."""
    if (found := noted(model.get_output_embeddings())) is None:  # pyright: ignore
        return
    note = found[1]
    if note.wanted and hasattr(output, "logits"):
        if note.predicted_tokens is None and note.y is not None:  # of logits that were made
            logits = output.logits
            logits = logits.full_tensor() if is_dtensor(logits) else logits
            best, scored = logits.argmax(-1), note.y != note.ignore_index
            note.predicted_tokens = best.masked_fill(~scored, -1)
            hits = ((best == note.y) & scored).sum()
            note.token_accuracy = hits / scored.sum().clamp_min(1)
        for name in note.wanted:
            setattr(output, name, getattr(note, name))
    note.clear()


def fuse_sites(patch: "Patch", head: nn.Module) -> str | None:
    """Put the fused forward into the head as it is now, or say why not."""
    if not (found := sites(head)):
        return f"{type(head).__name__} is more than a matrix product"
    for site in found:
        fn = vars(site).get("forward")
        if isinstance(fn, types.FunctionType) and not split_by_engine(fn):
            return f"{fn.__qualname__} is around its forward"
    paths = {module: path for path, module in patch.model.named_modules()}
    known = patch.recipe is not None and bool(patch.recipe.parts)
    for site in found:
        if "_liger_ticket" not in vars(site):
            new = partial(forward, site, patch.config)
            patch.replace(paths[site], site, new, "fused linear cross entropy")
            patch.set(site, "_liger_ticket", Ticket(checked=known))
            patch.undo(partial(gather, site))
    return None


def fuse(patch: "Patch", recipe: Recipe) -> str | None:
    """Fuse the head of the patch's model, or say why not. Without `fused_head`: its loss alone."""
    model, config = patch.model, patch.config
    if not (config.fused_head or config.cross_entropy or config.label_smoothing):
        return None
    head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        return "the model has no language-model head"
    from transformers.loss.loss_utils import ForCausalLMLoss

    original: Any = model.loss_function
    if original is not ForCausalLMLoss:
        name = getattr(original, "__qualname__", original)
        return f"the model's loss is {name}, not transformers' ForCausalLMLoss"
    if not calls(inspect.unwrap(type(model).forward), "loss_function"):
        return f"the forward of {type(model).__name__} computes its loss itself"
    if config.fused_head:
        if (why := fuse_sites(patch, head)) is not None:
            return why
        before = partial(leave_note, recipe)
        patch.undo(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        patch.undo(model.register_forward_hook(add_stats, always_call=True).remove)
    if config.cross_entropy or config.label_smoothing:
        patch.record("", model, "cross entropy")
    patch.set(model, "_loss_function", partial(loss_function, model, config, recipe, original))
    return None
