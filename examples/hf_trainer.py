# SPDX-License-Identifier: Apache-2.0
"""Hugging Face Trainer: a callback, and nothing else. --zero=2 or 3 trains with DeepSpeed, --fsdp with FSDP2.

On the CPU Trainer takes --fsdp without a word and trains with DDP; refound says so.

torchrun --standalone --logs-specs=refound --nproc-per-node=2 --max-restarts=10 examples/hf_trainer.py
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import refound
import torch
from common import BATCH, Report, device, options
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


def collate(rows: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
    tokens = torch.stack([row[0] for row in rows])
    return {"input_ids": tokens, "labels": tokens}


class Losses(TrainerCallback):
    """Reports what is logged."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._report(state.global_step, float(logs["loss"]))


def deepspeed_config(stage: int) -> dict[str, Any] | None:
    if not stage:
        return None
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing to compile on the CPU
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def main(arguments: Sequence[str] | None = None, report: Report = print) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=0)
    parser.add_argument("--fsdp", action="store_true")
    chosen, rest = parser.parse_known_args(arguments)
    args, on_cpu = options(rest), device().type == "cpu"
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, attention_dropout=0.1, **shape))
    data = TensorDataset(torch.randint(64, (64, 8)))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=BATCH,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            learning_rate=1e-2,
            use_cpu=on_cpu,  # without it every process trains alone on the CPU
            ddp_backend="gloo" if on_cpu else None,
            deepspeed=deepspeed_config(chosen.zero),
            fsdp=chosen.fsdp or None,  # pyright: ignore[reportArgumentType]
        )
        callbacks = [refound.TrainerCallback(every=args.every), Losses(report)]
        Trainer(model, settings, train_dataset=data, data_collator=collate, callbacks=callbacks).train()


if __name__ == "__main__":
    main()
