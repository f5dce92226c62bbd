"""Lightning under one strategy: every way of turning the patch on, against none.

    lightning_job.py STRATEGY OUTPUT

One JSON line a way: each step's loss on this process 0, the width of the logits, and how far the
parameters end from those of the plain run, as a share of how far any of them has moved (nan where
the strategy does not give whole parameters).
"""

import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

warnings.simplefilter("ignore")
import lightning.pytorch as pl  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from liger_kernel.lightning import LigerCallback, LigerPlugin, TokenMean  # noqa: E402
from tiny import Rows, build  # noqa: E402

CUDA = torch.cuda.is_available()
STRATEGIES: dict[str, tuple[str, str, dict[str, Any]]] = {  # Lightning's class, our name
    "ddp": ("DDPStrategy", "liger_ddp", {}),
    "fsdp": ("FSDPStrategy", "liger_fsdp", {}),
    "model_parallel": (
        "ModelParallelStrategy", "liger_model_parallel",
        dict(data_parallel_size=2, tensor_parallel_size=1),
    ),
    "deepspeed": ("DeepSpeedStrategy", "liger_deepspeed_stage_3", dict(stage=3)),
}  # fmt: skip
LR = 0.1


class Module(pl.LightningModule):
    """Its model is made, and under FSDP2 sharded, in `configure_model`."""

    def __init__(self, strategy: str) -> None:
        super().__init__()
        self.sharded, self.deepspeed = strategy == "model_parallel", strategy == "deepspeed"
        self.losses: list[float] = []
        self.widths: set[int] = set()

    def configure_model(self) -> None:
        if "lm" in self._modules:
            return
        # Under ZeRO's initialisation transformers cannot clear a padding row.
        padding = {"pad_token_id": None} if self.deepspeed else {}
        self.lm: Any = build(tie_word_embeddings=True, **padding)
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            mesh = self.device_mesh["data_parallel"]  # pyright: ignore
            for layer in self.lm.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.lm, mesh=mesh)

    def training_step(self, batch: Any, _: int) -> Tensor:
        out = self.lm(**batch, use_cache=False)
        self.losses.append(float(out.loss.detach()))
        self.widths.add(out.logits.shape[-1])
        return out.loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=LR)


def run(strategy: str, **options: Any) -> tuple[Module, dict[str, Tensor]]:
    name, ours, more = STRATEGIES[strategy]
    cls = getattr(pl.strategies, name)
    if options.pop("ours", False):
        cls = pl.strategies.StrategyRegistry[ours]["strategy"]
    options["strategy"] = cls(**more)
    token_mean = [] if strategy == "deepspeed" else [TokenMean()]
    lm = Module(strategy)
    trainer = pl.Trainer(
        accelerator="gpu" if CUDA else "cpu", devices=2, max_epochs=1, logger=False,
        accumulate_grad_batches=2, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        **options | dict(callbacks=[*options.get("callbacks", []), *token_mean]),
    )  # fmt: skip
    end: dict[str, Tensor] = {}

    class Keep(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            if strategy != "deepspeed":
                # Lightning's own of FSDP2 has left the GPU, where its parts are joined
                sharded = pl_module.state_dict() if pl_module.sharded else None
                found = sharded or trainer.strategy.lightning_module_state_dict()
                end.update({n: whole(p).detach().float().cpu() for n, p in found.items()})

    trainer.callbacks.append(Keep())
    trainer.fit(lm, torch.utils.data.DataLoader(Rows(), 1))  # pyright: ignore
    return lm, end


def whole(p: Any) -> Tensor:
    return p.full_tensor() if hasattr(p, "full_tensor") else p


WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "plugin": lambda: dict(plugins=[LigerPlugin()]),
    "callback": lambda: dict(callbacks=[LigerCallback()]),
    "strategy": lambda: dict(ours=True),
}


def main(strategy: str, output: Path) -> None:
    start: nn.Module = build(tie_word_embeddings=True)
    before = {f"lm.{n}": p.detach().clone() for n, p in start.state_dict().items()}
    plain: Any = None
    for way, options in WAYS.items():
        lm, end = run(strategy, **options())
        plain = plain or (lm, end)
        far = math.nan
        if end:
            want = plain[1]
            assert end.keys() == want.keys() == before.keys(), (list(end), list(before))
            moved = max(float((p - before[n]).abs().max()) for n, p in want.items())
            far = max(float((end[n] - p).abs().max()) for n, p in want.items()) / moved
        if lm.global_rank == 0:
            line = dict(
                way=way, losses=lm.losses, plain=plain[0].losses, widths=sorted(lm.widths),
                parameters=far,
            )  # fmt: skip
            with output.open("a") as file:
                print(json.dumps(line), file=file)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
