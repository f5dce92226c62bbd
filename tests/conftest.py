import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must precede the first import of a kernel module


@pytest.fixture(scope="session", autouse=True)
def context_of_autograds_thread() -> None:
    """torch warns, once a process, where a product is the first thing that this thread runs."""
    if torch.cuda.is_available():
        torch.ones(1, device="cuda", requires_grad=True).exp().backward()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random llama with tied embeddings and a byte tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("given") / "model"
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]
    tokens = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    end = len(alphabet) - 1
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def forgetful(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model with dropout, so that the state of the random numbers matters."""
    folder = tmp_path_factory.mktemp("given") / "forgetful"
    folder.mkdir()
    for file in Path(model).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    return str(folder)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Import an example as it is when run: its neighbours are importable."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    yield importlib.import_module
    for name in ("hf_trainer", "accelerate_loop", "sft", "preference", "lightning_finetune"):
        sys.modules.pop(name, None)
