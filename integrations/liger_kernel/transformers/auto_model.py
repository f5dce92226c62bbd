"""AutoLigerKernelForCausalLM, under upstream's name: load a model and patch it."""

from typing import Any

from transformers import AutoModelForCausalLM

from liger_kernel.config import NAMES, UPSTREAM
from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

OPTIONS = (*NAMES, *UPSTREAM)


class AutoLigerKernelForCausalLM(AutoModelForCausalLM):
    """`AutoModelForCausalLM` whose models come patched.

    `from_pretrained` and `from_config` take LigerConfig's fields and upstream's names as keywords;
    all else goes to transformers. A model type without a recipe is loaded, logged and not patched.
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> Any:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        return _patched(
            super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs), options
        )

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        return _patched(super().from_config(config, **kwargs), options)


def _patched(loaded: Any, options: dict[str, Any]) -> Any:
    model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
    _apply_liger_kernel_to_instance(model=model, **options)
    return loaded
