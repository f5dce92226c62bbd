"""TRL's trainers with `use_liger_loss`: what is put into one of them, and how it comes out."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from liger_kernel.config import disabled
from liger_kernel.stock import ClassEdits, Unsupported, add_fields
from liger_kernel.transformers.lora import sites
from liger_kernel.transformers.patch import Patch
from liger_kernel.trl.arguments import LigerLossArguments, configure_loss, supported
from liger_kernel.trl.concatenated import concatenated_forward
from liger_kernel.trl.head import KNOWS, Fused, fused_of, take_over
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
    given = (*args, *kwargs.values())  # a subclass's own `init` names them as it likes
    options: Any = next((it for it in given if hasattr(it, "use_liger_loss")), None)
    if options is None:
        init(*args, **kwargs)
        if getattr(trainer.args, "use_liger_loss", False) and not disabled():
            raise ValueError(
                f"{type(trainer).__name__} makes its own arguments: use_liger_loss has to be in "
                f"those that it is given"
            )
        return
    on, layers = options.use_liger_loss and not disabled(), getattr(options, "use_liger", False)
    name = supported(type(trainer))
    if on and name is None:
        raise ValueError(f"{type(trainer).__name__} has no liger loss")
    # Upstream's flag, by which `use_liger` patches the layers, is deprecated in TRL.
    options.use_liger_kernel = options.use_liger_kernel and not layers
    try:
        if not on:
            return init(*args, **kwargs)
        ours = Attached(trainer, options)
        try:
            with _hooked(trainer, name, ours):
                init(*args, **kwargs)
            _attach(ours, name)
        except BaseException:
            ours.revert()
            raise
    finally:
        options.use_liger_kernel = options.use_liger_kernel or layers
    trainer._liger = ours


class Attached:
    """What was put into one trainer and its models; `revert` takes it out.

    Attributes:
        patches: of the policy and, where there is one, of the reference model.
    """

    def __init__(self, trainer: Any, options: Any) -> None:
        self.trainer, self.options = trainer, options
        self.patches: list[Patch] = []
        self._undo: list[Callable[[], object]] = []

    @property
    def fused(self) -> list[Fused]:
        """What the heads of `patches` are told, and tell."""
        return [fused_of(patch.model) for patch in self.patches]

    def take_over(self, model: Any) -> None:
        """Put our engine behind the fused head that TRL has just added."""
        o = self.options
        patch = take_over(model, Fused(o.liger_memory_budget, o.liger_saved_logits_budget))
        self.patches.append(patch)
        self._undo.append(patch.revert)

    def add_head(self, model: Any) -> None:
        """The same for a model to which TRL adds none."""
        from trl.trainer.utils import add_fused_lm_head

        own = vars(model)
        before = {"forward": own["forward"]} if "forward" in own else {}

        def restore() -> None:
            if own["forward"] is not added:
                return  # it is within accelerate's autocast, and does nothing when not asked
            del own["forward"]
            own.update(before)

        add_fused_lm_head(model)
        added = own["forward"]
        self._undo.append(restore)
        self.take_over(model)

    def shadow(self, name: str, fn: Callable[..., Any], *given: Any) -> None:
        """Replace a method of this trainer by fn(trainer, *given, ...)."""
        if not hasattr(self.trainer, name):
            raise RuntimeError(_gone(type(self.trainer).__name__, name))
        setattr(self.trainer, name, partial(fn, self.trainer, *given))
        self._undo.append(partial(delattr, self.trainer, name))

    def revert(self) -> None:
        """TRL's own again, from the next step on."""
        while self._undo:
            self._undo.pop()()
        self.patches.clear()


def _gone(where: str, name: str) -> str:
    return f"{where} has no {name} any more; {KNOWS}"


@contextmanager
def _hooked(trainer: Any, name: str | None, ours: Attached) -> Iterator[None]:
    """While a trainer is built: what follows TRL's `add_fused_lm_head`, and LoRA on the head."""
    if name in CONCATENATED:
        yield
        return
    of_trl = (c for c in type(trainer).__mro__ if c.__module__.startswith("trl."))
    *_, stock = (c for c in of_trl if c.__name__ == f"{name}Trainer")  # some are made from it
    module: Any = sys.modules[stock.__module__]
    before = {n: getattr(module, n, None) for n in ("add_fused_lm_head", "BaseTunerLayer")}
    add = before["add_fused_lm_head"]
    if add is None:
        raise RuntimeError(_gone(stock.__module__, "add_fused_lm_head"))

    def add_fused_lm_head(model: Any, *args: Any, **kwargs: Any) -> None:
        add(model, *args, **kwargs)
        ours.take_over(model)

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


def _attach(ours: Attached, name: str | None) -> None:
    """The rest, once TRL's own `__init__` is through."""
    trainer = ours.trainer
    model: Any = trainer.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if name in CONCATENATED:
        _check(trainer)
        ours.add_head(base)
        fused = fused_of(base)
        ours.shadow("concatenated_forward", concatenated_forward, fused, name == "ORPO")
        if ours.options.use_liger_kernel:  # transformers' own patch, in train(): of the layers
            off = {"fused_linear_cross_entropy": False}
            given = ours.options.liger_kernel_config or {}
            ours.options.liger_kernel_config = given | off
    if not ours.patches or ours.patches[0].model is not base:
        raise RuntimeError(_gone(type(trainer).__name__, "fused head"))
    trained = any(p.requires_grad for p in base.get_output_embeddings().parameters())
    if name in KNOWN and trained and not _overridden(trainer, "_compute_loss"):
        own = getattr(trainer, "_compute_loss", None)
        ours.shadow("_compute_loss", KNOWN[name], fused_of(base), own)


def _overridden(trainer: Any, name: str) -> bool:
    """Whether a method is not TRL's but a subclass's, which may make anything of the outputs."""
    of = next((c for c in type(trainer).__mro__ if name in vars(c)), None)
    return of is not None and not of.__module__.startswith("trl.")


def _check(trainer: Any) -> None:
    """Refuse what ORPO and CPO would lose; TRL itself does for the trainers with a fused head."""
    if _overridden(trainer, "concatenated_forward"):
        raise ValueError(
            f"use_liger_loss would pass by the concatenated_forward of {type(trainer).__name__}; "
            f"leave one of them out"
        )
    if trainer.is_encoder_decoder:
        raise ValueError("use_liger_loss is for decoders: this model has an encoder too")
    if getattr(trainer.model.get_output_embeddings(), "lora_variant", None):  # DoRA and its kin
        raise ValueError("use_liger_loss cannot fuse this model's head: its adapter is not LoRA's")
    if trainer.model_init is not None:
        raise ValueError("use_liger_loss needs a model: model_init makes another one in train()")
    if trainer.args.n_gpu > 1:
        raise ValueError(
            "use_liger_loss does not go with nn.DataParallel; start one process a GPU with "
            "accelerate launch, or show one GPU with CUDA_VISIBLE_DEVICES=0"
        )


def install() -> Callable[[], None]:
    """Have TRL's own configurations and trainers take `use_liger_loss`.

    Raises:
        Unsupported: a TRL without a fused head; until 1.12 its own flag is `use_liger_kernel`.
    """
    import trl.trainer.utils

    if not hasattr(trl.trainer.utils, "add_fused_lm_head"):
        raise Unsupported(f"trl {trl.__version__} has no fused head; {KNOWS}")
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
