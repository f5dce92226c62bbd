"""Upstream's loss modules over `functional`, which says what arguments and metrics are.

Options are attributes under upstream's names. They are checked when the module is built, and read
when it is called.
"""

from typing import Any

from torch import Tensor, nn

from liger_core.losses import CPO, DPO, KTO, ORPO, SimPO
from liger_kernel.chunked_loss import functional
from liger_kernel.chunked_loss.functional import Metrics


class _FusedLinearLoss(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        vars(self).update(options)
        self._names = tuple(options)

    @property
    def options(self) -> dict[str, Any]:
        """The options as keywords of the functional form."""
        return {name: vars(self)[name] for name in self._names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LigerFusedLinearDPOLoss(_FusedLinearLoss):
    """See `functional.liger_fused_linear_dpo`. ipo and the other types that upstream has not are
    taken too."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        *,
        memory_budget: int | None = None,
    ) -> None:
        DPO(
            loss_type, beta=beta, label_smoothing=label_smoothing, discopop_tau=discopop_tau,
            average=average_log_prob, nll_weight=alpha,
        )  # fmt: skip
        super().__init__(
            ignore_index=ignore_index, beta=beta, alpha=alpha, compute_nll_loss=compute_nll_loss,
            compiled=compiled, use_ref_model=use_ref_model, average_log_prob=average_log_prob,
            chunk_size=chunk_size, loss_type=loss_type, label_smoothing=label_smoothing,
            discopop_tau=discopop_tau, memory_budget=memory_budget,
        )  # fmt: skip

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None,
        ref_input: Tensor | None = None, ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:  # fmt: skip
        return functional.liger_fused_linear_dpo(
            _input, lin_weight, target, bias, ref_input, ref_weight, ref_bias, **self.options
        )


class LigerFusedLinearORPOLoss(_FusedLinearLoss):
    """See `functional.liger_fused_linear_orpo`."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
        *,
        memory_budget: int | None = None,
    ) -> None:
        ORPO(beta)
        super().__init__(
            ignore_index=ignore_index, beta=beta, compute_nll_loss=compute_nll_loss,
            compiled=compiled, chunk_size=chunk_size, memory_budget=memory_budget,
        )  # fmt: skip

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:  # fmt: skip
        return functional.liger_fused_linear_orpo(
            _input, lin_weight, target, bias, nll_target=nll_target, **self.options
        )


class LigerFusedLinearCPOLoss(_FusedLinearLoss):
    """See `functional.liger_fused_linear_cpo`."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        *,
        memory_budget: int | None = None,
    ) -> None:
        CPO(beta=beta, label_smoothing=label_smoothing, average=average_log_prob, nll_weight=alpha)
        super().__init__(
            ignore_index=ignore_index, beta=beta, alpha=alpha, label_smoothing=label_smoothing,
            compute_nll_loss=compute_nll_loss, compiled=compiled,
            average_log_prob=average_log_prob, chunk_size=chunk_size, memory_budget=memory_budget,
        )  # fmt: skip

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Metrics]:
        return functional.liger_fused_linear_cpo(_input, lin_weight, target, bias, **self.options)


class LigerFusedLinearSimPOLoss(_FusedLinearLoss):
    """See `functional.liger_fused_linear_simpo`."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
        *,
        memory_budget: int | None = None,
    ) -> None:
        SimPO(beta=beta, gamma=gamma, label_smoothing=label_smoothing, nll_weight=alpha)
        super().__init__(
            ignore_index=ignore_index, beta=beta, alpha=alpha, label_smoothing=label_smoothing,
            compute_nll_loss=compute_nll_loss, compiled=compiled, gamma=gamma,
            chunk_size=chunk_size, memory_budget=memory_budget,
        )  # fmt: skip

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Metrics]:
        return functional.liger_fused_linear_simpo(_input, lin_weight, target, bias, **self.options)


class LigerFusedLinearKTOLoss(_FusedLinearLoss):
    """See `functional.liger_fused_linear_kto`. Called with the input first, as upstream's is."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        *,
        memory_budget: int | None = None,
    ) -> None:
        KTO(beta=beta)
        super().__init__(
            ignore_index=ignore_index, beta=beta, compiled=compiled, use_ref_model=use_ref_model,
            average_log_prob=average_log_prob, chunk_size=chunk_size, memory_budget=memory_budget,
        )  # fmt: skip

    def forward(
        self, _input: Tensor, lin_weight: Tensor, target: Tensor, bias: Tensor | None = None,
        preference_labels: Tensor | None = None, ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None, ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:  # fmt: skip
        if preference_labels is None:
            raise ValueError("preference_labels, (B,) bool, says which sequences are desirable")
        return functional.liger_fused_linear_kto(
            _input, lin_weight, target, preference_labels, bias, ref_input, ref_weight, ref_bias,
            kl, **self.options,
        )  # fmt: skip
