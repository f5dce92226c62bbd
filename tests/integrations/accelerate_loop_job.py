"""A training loop as anybody writes it with accelerate: nothing in here knows of Liger."""

import json
import time

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    accelerator = Accelerator()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = DataLoader(torch.randint(97, (12, 9)), batch_size=2)  # type: ignore[arg-type]
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    for ids in batches:
        out = model(input_ids=ids, labels=ids, use_cache=False)
        accelerator.backward(out.loss)
        optimizer.step()
        optimizer.zero_grad()
        losses = accelerator.gather(out.loss.detach().view(1)).tolist()
        if accelerator.is_main_process:
            kind = accelerator.distributed_type.value
            print(json.dumps([kind, losses, out.logits.shape[-1]]), flush=True)
    time.sleep(1)  # gloo's threads wait for the GIL, with which the group would wait for them
    accelerator.end_training()


if __name__ == "__main__":
    main()
