"""TRL's trainers with `use_liger_loss`: what is put into one of them, and how it comes out."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from liger_kernel.config import disabled
from liger_kernel.stock import ClassEdits, add_fields
from liger_kernel.transformers.lora import sites
from liger_kernel.transformers.patch import Patch
from liger_kernel.trl.arguments import LigerLossArguments, configure_loss, supported
from liger_kernel.trl.concatenated import concatenated_forward
from liger_kernel.trl.head import Fused, fused_of, take_over
from liger_kernel.trl.known import compute_dpo_loss, compute_kto_loss

CONCATENATED = ("ORPO", "CPO")  # these make full logits in TRL
KNOWN = {"DPO": compute_dpo_loss, "KTO": compute_kto_loss}


class LigerLoss:
    """A mixin for TRL's trainers; `use_liger_loss` in their arguments turns it on.

        class MyTrainer(LigerLoss, trl.DPOTrainer): ...

    Raises, when the trainer is built:
        ValueError: a model whose head cannot be fused, or is patched already; an encoder and
            decoder; nn.DataParallel.
        RuntimeError: a TRL in which what is hooked is gone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _build(self, super().__init__, *args, **kwargs)


def _build(trainer: Any, init: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Call TRL's own `init` of this trainer, and make the loss ours where its arguments say so."""
    options = inspect.signature(init).bind_partial(*args, **kwargs).arguments.get("args")
    if options is None or not hasattr(options, "use_liger_loss"):
        return init(*args, **kwargs)
    on, layers = options.use_liger_loss and not disabled(), getattr(options, "use_liger", False)
    name = supported(type(trainer))
    if on and name is None:
        raise ValueError(f"{type(trainer).__name__} has no liger loss")
    # Upstream's flag, by which `use_liger` patches the layers, is deprecated in TRL.
    options.use_liger_kernel = options.use_liger_kernel and not layers
    try:
        if not on:
            return init(*args, **kwargs)
        patches: list[Patch] = []
        with _hooked(trainer, name, partial(_take_over, options, patches)):
            init(*args, **kwargs)
    finally:
        options.use_liger_kernel = options.use_liger_kernel or layers
    _attach(trainer, name, options, patches)


def _take_over(options: Any, patches: list[Patch], model: Any) -> None:
    fused = Fused(options.liger_memory_budget, options.liger_saved_logits_budget)
    patches.append(take_over(model, fused))


@contextmanager
def _hooked(trainer: Any, name: str | None, added: Callable[[Any], None]) -> Iterator[None]:
    """While a trainer is built: what follows TRL's `add_fused_lm_head`, and LoRA on the head."""
    if name in CONCATENATED:
        yield
        return
    stock = next(
        c
        for c in type(trainer).__mro__
        if c.__name__ == f"{name}Trainer" and c.__module__.startswith("trl.")
    )
    module: Any = sys.modules[stock.__module__]
    before = {n: getattr(module, n, None) for n in ("add_fused_lm_head", "BaseTunerLayer")}
    add = before["add_fused_lm_head"]
    if add is None:
        raise RuntimeError(
            f"{stock.__module__} has no add_fused_lm_head any more; use_liger_loss knows TRL 1.15 "
            f"and 1.16"
        )

    def add_fused_lm_head(model: Any, *args: Any, **kwargs: Any) -> None:
        add(model, *args, **kwargs)
        added(model)

    module.add_fused_lm_head = add_fused_lm_head
    if before["BaseTunerLayer"] is not None:
        module.BaseTunerLayer = _UnknownAdapters
    try:
        yield
    finally:
        vars(module).update({n: there for n, there in before.items() if there is not None})


class _Adapters(type):
    """PEFT's BaseTunerLayer but for what the engine computes itself, LoRA around the head."""

    def __instancecheck__(cls, head: Any) -> bool:
        from peft.tuners.tuners_utils import BaseTunerLayer

        if not isinstance(head, BaseTunerLayer):
            return False
        module: Any = head
        return not sites(module) or bool(getattr(module, "lora_variant", None))


class _UnknownAdapters(metaclass=_Adapters):
    """Stands for BaseTunerLayer."""


class Attached:
    """What was put into one trainer and its models; `revert` takes it out."""

    def __init__(self, trainer: Any, patches: list[Patch]) -> None:
        self.trainer, self.patches = trainer, patches
        self._names: list[str] = []

    @property
    def fused(self) -> list[Fused]:
        """Of the policy and, where there is one, of the reference model."""
        return [fused_of(patch.model) for patch in self.patches]

    def shadow(self, name: str, fn: Callable[..., Any], *given: Any) -> None:
        """Replace a method of this trainer by fn(trainer, *given, ...)."""
        if not hasattr(self.trainer, name):
            raise RuntimeError(
                f"{type(self.trainer).__name__} has no {name} any more; use_liger_loss knows TRL "
                f"1.15 and 1.16"
            )
        setattr(self.trainer, name, partial(fn, self.trainer, *given))
        self._names.append(name)

    def revert(self) -> None:
        """TRL's own again, from the next step on."""
        for name in self._names:
            delattr(self.trainer, name)
        self._names.clear()
        while self.patches:
            self.patches.pop().revert()


def _attach(trainer: Any, name: str | None, options: Any, patches: list[Patch]) -> None:
    """The rest, once TRL's own `__init__` is through."""
    model: Any = trainer.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    trainer._liger = attached = Attached(trainer, patches)
    if name in CONCATENATED:
        _add_head(trainer, base, options, patches)
        attached.shadow("concatenated_forward", concatenated_forward, fused_of(base))
    if not patches or patches[0].model is not base:
        raise RuntimeError(
            f"{type(trainer).__name__} has no fused head any more; use_liger_loss knows TRL 1.15 "
            f"and 1.16"
        )
    head = base.get_output_embeddings()
    if name in KNOWN and any(p.requires_grad for p in head.parameters()):
        own = trainer._compute_loss if hasattr(trainer, "_compute_loss") else None
        attached.shadow("_compute_loss", KNOWN[name], fused_of(base), own)


def _add_head(trainer: Any, base: Any, options: Any, patches: list[Patch]) -> None:
    """A fused head for a trainer that has none."""
    from trl.trainer.utils import add_fused_lm_head

    if trainer.is_encoder_decoder:
        raise ValueError("use_liger_loss is for decoders: this model has an encoder too")
    if trainer.args.n_gpu > 1:
        raise ValueError(
            "use_liger_loss does not go with nn.DataParallel; start one process a GPU with "
            "accelerate launch, or show one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    before = vars(base).get("forward")
    add_fused_lm_head(base)
    _take_over(options, patches, base)
    theirs = vars(base)["forward"]

    def restore() -> None:
        vars(base).pop("forward") if before is None else vars(base).update(forward=before)

    patches[-1].undo(restore)
    patches[-1]._undo.insert(0, patches[-1]._undo.pop())  # the last to be undone
    del theirs
    if options.use_liger_kernel:  # transformers' own patch, in train(): of the layers alone
        off = {"fused_linear_cross_entropy": False}
        options.liger_kernel_config = (options.liger_kernel_config or {}) | off


def install() -> Callable[[], None]:
    """Have TRL's own configurations and trainers take `use_liger_loss`.

    Raises:
        ImportError: TRL before 1.15, whose trainers have Liger losses of their own.
    """
    from trl.trainer.base_config import _BaseConfig
    from trl.trainer.base_trainer import _BaseTrainer

    undo = add_fields(_BaseConfig, LigerLossArguments, configure_loss)
    edits = ClassEdits()

    def hook(cls: type) -> None:
        own = vars(cls)
        if supported(cls) and cls.__module__.startswith("trl.") and "__init__" in own:
            edits.put(cls, "__init__", _building(own["__init__"], edits))

    def hook_all(cls: type) -> None:
        hook(cls)
        for sub in cls.__subclasses__():
            hook_all(sub)

    def __init_subclass__(cls: type, **kwargs: Any) -> None:  # of trainers imported later
        super(_BaseTrainer, cls).__init_subclass__(**kwargs)  # pyright: ignore
        if edits.on:
            hook(cls)

    hook_all(_BaseTrainer)
    edits.put(_BaseTrainer, "__init_subclass__", classmethod(__init_subclass__))  # pyright: ignore

    def revert() -> None:
        edits.revert()
        undo()

    return revert


def _building(init: Callable[..., None], edits: ClassEdits) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        own = functools.partial(init, self)
        if not edits.on or isinstance(self, LigerLoss) or hasattr(self, "_liger_building"):
            return own(*args, **kwargs)
        self._liger_building = True
        try:
            _build(self, own, *args, **kwargs)
        finally:
            del self._liger_building

    return __init__
