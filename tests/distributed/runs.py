"""What is run under which engine, as fields of `job.Run`; one start of processes runs one job."""

from typing import Any

Case = dict[str, Any]

UNTIED = dict(tie_word_embeddings=False)  # gemma2's head is its embedding elsewhere
PLAIN = dict(mlp_bias=False, attention_bias=False)  # of a plan that does not split biases
APART = dict(model="gemma2", refused="shared with")  # torch refuses it in its own words

BASIC: list[Case] = [
    dict(traffic=True),
    dict(steps=3),
    dict(ignored=True),
    dict(order="engine-patch"),
    dict(accumulate=True),
]
FULL: list[Case] = [
    *BASIC,
    dict(model="gemma2", total="int", over=UNTIED),
    dict(model="granite", total="float", over=UNTIED),
    dict(model="mixtral"),
    dict(total="none"),
    dict(twice=True),
    dict(checkpointing=True),
    dict(shifted=True),
    dict(evaluate=True),
    dict(logits=True),
    dict(logits=True, steps=3),
    dict(revert=True),
    dict(autocast=True),
    dict(total="bf16", refused="rounds counts"),
]
TIED: list[Case] = [
    dict(model="gemma2", steps=3),
    dict(model="gemma2", accumulate=True),
    dict(model="granite", total="float"),
]
PEFT: list[Case] = [
    dict(peft="lora", traffic=True),
    dict(peft="lora", checkpointing=True, twice=True),
    dict(peft="lora", steps=3),
    dict(model="gemma2", peft="lora-head", over=UNTIED),
    dict(peft="lora-head", traffic=True),
    dict(peft="lora-head", order="patch-peft-engine"),
    dict(peft="lora-head", order="engine-patch"),
    dict(peft="save-head"),
    dict(peft="save-head", order="patch-peft-engine"),
    dict(peft="save-head", order="engine-patch"),
]
BF16 = [dict(dtype="bfloat16"), dict(dtype="bfloat16", checkpointing=True)]
COMPILED: list[Case] = [dict(compile=True), dict(compile=True, peft="lora")]
SPLIT: list[Case] = [
    *(dict(model=model) for model in ("gemma2", "granite", "mixtral")),
    *FULL[8:],
    dict(traffic=True),
    dict(steps=3),
    dict(ignored=True),
    dict(order="engine-patch"),
]

NO_PLAIN = [case for case in SPLIT if not case.keys() & {"revert", "traffic", "autocast"}]
"""Where the plain model cannot compute a loss of logits that stay split."""


def of(engine: str, *cases: list[Case]) -> list[Case]:
    return [dict(engine=engine) | case for some in cases for case in some]


JOBS: dict[str, list[Case]] = {
    "ddp": [
        *of("ddp", FULL, TIED, PEFT, BF16),
        *of("cp", BASIC[:4], [dict(checkpointing=True), dict(peft="lora")]),
    ],
    "fsdp1": [
        *of("fsdp1", FULL, TIED, PEFT, BF16),
        *of("fsdp1-head", FULL, PEFT, [APART]),
        *of("fsdp1-flat", BASIC, TIED),
        *of("fsdp1-flat-head", BASIC[:1], [APART]),
    ],
    "fsdp2": [
        *of("fsdp2", FULL, TIED, PEFT, BF16),
        *of("fsdp2-head", FULL, PEFT, BF16, [APART, dict(again=True)]),
    ],
    "zero": [
        *of("zero1", BASIC, TIED[:1]),
        *of("zero2", FULL, TIED, PEFT, BF16[:1]),
        *of("zero2-offload", BASIC),
    ],
    "zero3": [  # which adds gradients up until a step, so that no second one can be looked at
        *of(
            "zero3", [case for case in FULL if "revert" not in case], TIED[:2], PEFT[3:8], BF16[:1]
        ),
        *of("zero3-init", BASIC[:2], TIED[:2], PEFT[:1]),
        *of("zero3-offload", BASIC[1:], PEFT[4:5]),
    ],
    "tensor": [
        *of(
            "tp-hf", SPLIT, BF16[:1], [dict(model="qwen3"), dict(model="phi3"), dict(model="glm4")]
        ),
        *of("tp-rep", SPLIT),
        *of("tp-shard", NO_PLAIN),
        *of("tp-sequence", [case | dict(over=PLAIN) for case in BASIC + FULL[8:12] + BF16[:1]]),
    ],
    "compiled": [*of("ddp", COMPILED[:1]), *of("fsdp2", COMPILED[:1])],
}
"""By name; of two processes each."""

SLOW = [
    *(case for name in ("fsdp1", "fsdp2-head") for case in of(name, COMPILED)),
    *(case for name in ("ddp", "fsdp2") for case in of(name, COMPILED[1:])),
    *(case for name in ("zero2", "zero3", "tp-rep", "tp-hf") for case in of(name, COMPILED[:1])),
    *of("fsdp1-flat-head", BASIC[1:]),
    *of("zero3", TIED[2:], PEFT[:3], PEFT[8:]),
    *of("zero3-init", BASIC[2:3], TIED[2:], PEFT[4:5]),
]

FOUR = [
    case
    for name in ("fsdp2-tp-hf", "fsdp2-tp-sequence", "fsdp2-tp-head")
    for case in of(name, BASIC + (BF16 if "hf" in name else []))
    for case in [case | (dict(over=PLAIN) if "sequence" in name else {})]
]
"""Of four."""
