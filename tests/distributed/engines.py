"""How each engine wraps a model, runs backward, and what gradients it then holds."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

LR = 0.1


def hf(model: Any) -> Any:
    """The transformers model within what engines and PEFT put around it."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def clean(name: str) -> str:
    for part in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(part, "")
    return name.removeprefix("module.")


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


class Engine:
    """One process, and what all of them have in common."""

    def __init__(self, device: torch.device, dtype: torch.dtype, accumulate: int) -> None:
        self.device, self.dtype, self.accumulate = device, dtype, accumulate
        self.rank, self.world = dist.get_rank(), dist.get_world_size()  # of data

    def share(self) -> range:
        """Whose batches this process trains on; there are as many as processes."""
        parts = dist.get_world_size() // self.world
        return range(self.rank * parts, (self.rank + 1) * parts)

    def inputs(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Of the model."""
        return dict(input_ids=ids, labels=labels)

    def wrap(self, model: nn.Module) -> nn.Module:
        return model.to(self.device, self.dtype)

    def optimize(self, model: Any) -> None:
        params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(params, lr=LR, foreach=False)  # some may be DTensors

    def held(self, model: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def backward(self, model: Any, loss: Tensor) -> None:
        loss.backward()

    def between(self, model: Any) -> None:
        """After a backward that is not the last before a step."""

    def step(self, model: Any) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def clear(self, model: Any) -> None:
        """Let go of the gradients."""
        model.zero_grad()

    def recovered(self, model: Any) -> Any:
        """The model after a step that broke off, as the engine's users do it."""
        self.clear(model)
        return model

    def gradients(self, model: Any) -> dict[str, Tensor]:
        named = ((clean(n), p.grad) for n, p in model.named_parameters())
        return {n: whole(g).detach().clone() for n, g in named if g is not None}

    def parameters(self, model: Any) -> dict[str, Tensor]:
        return {clean(n): whole(p).detach().clone() for n, p in model.named_parameters()}


class DDP(Engine):
    def wrap(self, model: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(super().wrap(model))

    def recovered(self, model: Any) -> Any:
        return super().recovered(DDP.wrap(self, model.module))

    def held(self, model: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if last else model.no_sync()


class FSDP1(DDP):
    recovered = Engine.recovered

    def __init__(self, *args: Any, head: bool = False, flat: bool = False) -> None:
        super().__init__(*args)
        self.head, self.flat = head, flat

    def wrap(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
        from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

        units = {*hf(model).model.layers, *([hf(model).lm_head] if self.head else [])}
        mixed = None
        if self.dtype != torch.float32:
            mixed = MixedPrecision(self.dtype, torch.float32, self.dtype)
        return FullyShardedDataParallel(
            model.to(self.device),
            auto_wrap_policy=functools.partial(
                lambda_auto_wrap_policy, lambda_fn=units.__contains__
            ),
            use_orig_params=not self.flat, device_id=self.device, mixed_precision=mixed,
        )  # fmt: skip

    @contextlib.contextmanager
    def _summoned(self, model: Any, grads: bool) -> Iterator[None]:
        from torch.distributed.fsdp import FullyShardedDataParallel

        kept = [p.detach().clone() for p in model.parameters()]
        if grads and self.flat:  # only parameters can be gathered: put gradients in their place
            for p in model.parameters():
                p.data.copy_(p.grad if p.grad is not None else torch.zeros_like(p))
        with FullyShardedDataParallel.summon_full_params(model, with_grads=grads and not self.flat):
            yield
        for p, before in zip(model.parameters(), kept, strict=True):
            p.data.copy_(before)

    def gradients(self, model: Any) -> dict[str, Tensor]:
        with self._summoned(model, True):
            return self.flat_or(model)

    def flat_or(self, model: Any) -> dict[str, Tensor]:
        return Engine.parameters(self, model) if self.flat else Engine.gradients(self, model)

    def parameters(self, model: Any) -> dict[str, Tensor]:
        with self._summoned(model, False):
            return super().parameters(model)


class FSDP2(Engine):
    def __init__(self, *args: Any, head: bool = False, mesh: Any = None) -> None:
        super().__init__(*args)
        self.head, self.mesh = head, mesh

    def wrap(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = self.mesh or dist.init_device_mesh(self.device.type, (self.world,))
        options: dict[str, Any] = dict(mesh=mesh)
        if self.dtype != torch.float32:
            options["mp_policy"] = MixedPrecisionPolicy(self.dtype, torch.float32)
        model = model.to(self.device)
        for layer in hf(model).model.layers:
            fully_shard(layer, **options)
        if self.head:
            fully_shard(hf(model).lm_head, **options)
        return fully_shard(model, **options)

    def recovered(self, model: Any) -> Any:
        self.clear(model)  # of what is whole at the moment, before it is not there to be found
        if hasattr(model, "reset_iter_state"):  # torch 2.13, and needed after a backward
            model.reset_iter_state()
        return super().recovered(model)

    def held(self, model: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
        model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()


def zero_config(stage: int, accumulate: int, dtype: torch.dtype, offload: bool) -> dict[str, Any]:
    zero: dict[str, Any] = dict(
        stage=stage, overlap_comm=False, reduce_bucket_size=10**6, allgather_bucket_size=10**6
    )  # fmt: skip
    if stage == 3:  # the tiny parameters too are to be split
        zero |= dict(stage3_param_persistence_threshold=0, stage3_prefetch_bucket_size=0)
    if offload:
        zero["offload_optimizer"] = dict(device="cpu", pin_memory=False)
        zero |= dict(offload_param=dict(device="cpu")) if stage == 3 else {}
    return dict(
        train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=accumulate,
        zero_optimization=zero, bf16=dict(enabled=dtype == torch.bfloat16),
        zero_allow_untested_optimizer=True, zero_force_ds_cpu_optimizer=False,
        gradient_clipping=0.0,
    )  # fmt: skip


class Zero(Engine):
    def __init__(self, *args: Any, stage: int, init: bool = False, offload: bool = False) -> None:
        super().__init__(*args)
        self.init = init
        self.config = zero_config(stage, self.accumulate, self.dtype, offload)

    def before(self, model: nn.Module) -> nn.Module:
        """`zero.Init`, which splits a model before it is patched."""
        import deepspeed

        if self.init:
            deepspeed.zero.Init(module=model, config_dict_or_path=self.config, dtype=self.dtype)
        return model

    def wrap(self, model: nn.Module) -> nn.Module:
        import deepspeed

        params = [p for p in model.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(params, lr=LR), config=self.config
        )
        return engine

    def optimize(self, model: Any) -> None: ...

    def backward(self, model: Any, loss: Tensor) -> None:
        model.backward(loss * self.accumulate)  # DeepSpeed divides by it

    def between(self, model: Any) -> None:
        model.step()  # it counts

    step = between

    def _full(self, model: Any, get: Any) -> dict[str, Tensor]:
        named = ((clean(n), get(p)) for n, p in model.named_parameters() if p.requires_grad)
        return {n: t.detach().clone() for n, t in named if t is not None}

    def gradients(self, model: Any) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        return self._full(model, safe_get_full_grad)

    def parameters(self, model: Any) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return self._full(model, safe_get_full_fp32_param)


class TP(Engine):
    """Tensor parallelism: the same data everywhere. plan: "hf", "rep", "shard", "sequence"."""

    def __init__(self, *args: Any, plan: str, mesh: Any = None) -> None:
        super().__init__(*args)
        self.plan = plan
        self.mesh = mesh or dist.init_device_mesh(self.device.type, (self.world,))
        self.rank, self.world = 0, 1

    def wrap(self, model: nn.Module) -> nn.Module:
        from torch.distributed.tensor.parallel import parallelize_module
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism

        model = super().wrap(model)
        if self.plan == "hf":
            return apply_tensor_parallelism(model, self.mesh)
        return parallelize_module(model, self.mesh, plan(self.plan, hf(model)))


def plan(name: str, model: Any) -> dict[str, Any]:
    """torch's styles by module. "sequence": activations between layers are split by tokens, and
    stay DTensors all the way."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
    )

    if name == "rep":
        return {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    if name == "shard":
        return {"lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}
    tokens = Shard(1)
    row = functools.partial(
        RowwiseParallel, output_layouts=tokens, use_local_output=False
    )  # fmt: skip
    whole_input = PrepareModuleInput(
        input_kwarg_layouts=dict(hidden_states=tokens),
        desired_input_kwarg_layouts=dict(hidden_states=Replicate()),
    )
    styles: dict[str, Any] = {
        "model.embed_tokens": row(input_layouts=Replicate()),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=tokens, output_layouts=Replicate()),
    }
    for i in range(len(model.model.layers)):
        at = f"model.layers.{i}."
        styles |= {
            at + "input_layernorm": SequenceParallel(),
            at + "self_attn": whole_input,
            **{at + f"self_attn.{n}_proj": ColwiseParallel() for n in "qkv"},
            at + "self_attn.o_proj": row(),
            at + "post_attention_layernorm": SequenceParallel(),
            at + "mlp.gate_proj": ColwiseParallel(input_layouts=tokens, use_local_output=False),
            at + "mlp.up_proj": ColwiseParallel(input_layouts=tokens, use_local_output=False),
            at + "mlp.down_proj": row(),
        }
    return styles


class FSDP2TP(FSDP2):
    """FSDP2 over one dimension of a mesh, tensor parallelism over the other, of two processes."""

    def __init__(self, *args: Any, plan: str, head: bool = False) -> None:
        world = dist.get_world_size()
        device = args[0].type
        both = dist.init_device_mesh(device, (world // 2, 2), mesh_dim_names=("data", "tensor"))
        super().__init__(*args, head=head, mesh=both["data"])
        self.tensor = TP(self.device, torch.float32, 1, plan=plan, mesh=both["tensor"])
        self.rank, self.world = both["data"].get_local_rank(), world // 2

    def wrap(self, model: nn.Module) -> nn.Module:
        return super().wrap(self.tensor.wrap(model))


class CP(DDP):
    """Context parallelism: a part of every sequence in each process, whose attention gathers the
    keys and values of all. Gradients are averaged as DDP does it, the loss is a part of a sum."""

    def share(self) -> range:
        return range(self.world)

    def wrap(self, model: nn.Module) -> nn.Module:
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register("gathered", gathered_attention)
        AttentionMaskInterface.register("gathered", lambda *_, **__: None)
        hf(model).set_attn_implementation("gathered")
        return super().wrap(model)

    def inputs(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
        at = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        named = dict(input_ids=ids, labels=labels, shift_labels=shifted, position_ids=at)
        return {n: t.chunk(self.world, 1)[self.rank].contiguous() for n, t in named.items()}


def gathered_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """q (B, heads, T, D) of this process's tokens; k and v likewise, gathered here."""
    from torch.distributed.nn.functional import all_gather

    groups, T = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (torch.cat(all_gather(t.contiguous()), 2).repeat_interleave(groups, 1) for t in (k, v))
    at = torch.arange(T, device=q.device) + T * dist.get_rank()
    later = torch.arange(k.shape[2], device=q.device) > at[:, None]
    scores = (q @ k.mT * scaling).masked_fill(later, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2), None


ENGINES: dict[str, Any] = {
    "none": Engine,
    "ddp": DDP,
    "fsdp1": FSDP1,
    "fsdp1-head": functools.partial(FSDP1, head=True),
    "fsdp1-flat": functools.partial(FSDP1, flat=True),
    "fsdp1-flat-head": functools.partial(FSDP1, flat=True, head=True),
    "fsdp2": FSDP2,
    "fsdp2-head": functools.partial(FSDP2, head=True),
    "zero1": functools.partial(Zero, stage=1),
    "zero2": functools.partial(Zero, stage=2),
    "zero2-offload": functools.partial(Zero, stage=2, offload=True),
    "zero3": functools.partial(Zero, stage=3),
    "zero3-init": functools.partial(Zero, stage=3, init=True),
    "zero3-offload": functools.partial(Zero, stage=3, offload=True),
    "cp": CP,
    "tp-hf": functools.partial(TP, plan="hf"),
    "tp-rep": functools.partial(TP, plan="rep"),
    "tp-shard": functools.partial(TP, plan="shard"),
    "tp-sequence": functools.partial(TP, plan="sequence"),
    "fsdp2-tp-hf": functools.partial(FSDP2TP, plan="hf"),
    "fsdp2-tp-sequence": functools.partial(FSDP2TP, plan="sequence"),
    "fsdp2-tp-head": functools.partial(FSDP2TP, plan="rep", head=True),
}
