"""Settings of the Trainer and of DeepSpeed, and the model with LoRA layers that they train, whole or sharded."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainingArguments, set_seed
from transformers.utils import logging

from hfprune_dist.checkpoints.lora_adapter import lora_targets
from hfprune_dist.distributed.frozen_model import placement_here
from hfprune_dist.distributed.world import World
from hfprune_dist.kinds.memory import Placement, Sizes
from hfprune_dist.kinds.training import training_need
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.training.fine_tuning import FineTuning

# More elements than any parameter has.
KEEP_ALL_GATHERED = {"stage3_param_persistence_threshold": 2**62}
PROJECT = "hfprune"  # under which trackers file the runs
MAX_GRAD_NORM = 1.0  # the Trainer's default, which the published recipe doesn't change


def prepare_process() -> None:
    """Quiet transformers and torch, and keep DeepSpeed from importing torch.compile; for the rest of the process."""
    logging.set_verbosity_error()
    # DeepSpeed decorates an optimizer that isn't used here with torch.compile, which takes seconds to import.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # DeepSpeed calls collectives by their old names, and torch warns at each call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def _zero3_config(bfloat16: bool, whole: bool) -> dict[str, Any]:
    """Parameters, gradients and optimizer states sharded; gradients reduced and added up in float32.

    Blocks of experts are hooked like all other modules, as in ``distributed.zero3``. If frozen weights are ``whole``,
    DeepSpeed doesn't manage them, and LoRA's stay gathered between optimizer steps.
    Otherwise, parameters are released right after use. To find those that backward uses again soon, DeepSpeed would
    walk over up to a billion parameters ahead for every module: 20 s in the second step, with LoRA's many modules.
    """
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": False,
            "stage3_max_reuse_distance": 0,
            "leaf_module": {"classes": []},
            **(KEEP_ALL_GATHERED if whole else {}),
        },
        "bf16": {"enabled": bfloat16},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def training_arguments(
    task: FineTuning, accumulation_steps: int, folder: Path, placement: Placement, world: World
) -> TrainingArguments:
    """Settings of the Trainer; while they exist, from_pretrained shards a model as it loads."""
    settings = task.settings
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    os.environ.update(dict.fromkeys(("TENSORBOARD_LOGGING_DIR", "WANDB_DIR"), str(task.run_folder)))
    on_cpu = world.device.type == "cpu"
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,  # one pass over ScheduledRows, which has the rows of all epochs
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=accumulation_steps,
        train_sampling_strategy="sequential",
        optim="adamw_torch",
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=MAX_GRAD_NORM,
        bf16=settings.dtype == "bfloat16",
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu else "nccl",
        ddp_timeout=task.timeout_minutes * 60,
        deepspeed=_zero3_config(settings.dtype == "bfloat16", placement.whole),
        gradient_checkpointing=placement.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=list(task.report_to),
        run_name=task.run_folder.name,
        project=PROJECT,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        log_level="error",
        seed=task.seed,
    )


def place_training(task: FineTuning, world: World) -> Placement:
    """Decide together how to place a training in the free memory."""
    rows, tokens = task.settings.micro_batch_size, len(task.rows(0)["input_ids"])
    how = {"distills": task.distills, "masks": task.masked_to is not None}
    return placement_here(
        training_need(task.settings, Sizes.of(task.checkpoint), rows, tokens, **how), task.sharding, world
    )


def load_trainable_model(task: FineTuning) -> nn.Module:
    """Load the model with LoRA layers, which get the weights of ``task.start`` if there is one."""
    dtype = getattr(torch, task.settings.dtype)
    model = load_causal_lm(task.checkpoint.path, dtype)
    # With a cache, transformers doesn't look for packed pairs. The body may have a configuration of its own.
    configs: list[Any] = [model.config, task.checkpoint.family.body_of(model).config]
    for config in configs:
        config.use_cache = False
        # Where a configuration asks for it, experts' load balance would enter the loss, once for every micro-batch.
        config.output_router_logits = False
    set_seed(task.seed)
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=task.settings.rank,
        lora_alpha=task.settings.alpha,
        lora_dropout=task.settings.dropout,
        target_modules=lora_targets(task.checkpoint.family, task.checkpoint.ranks),
    )
    adapted: nn.Module = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    if task.start is not None:
        adapted.load_state_dict(task.start.weights, strict=False)
    return adapted


def keep_whole(model: nn.Module) -> None:
    """Turn a model's frozen parameters into buffers, so that DeepSpeed shards nothing but LoRA's weights.

    The model must be on its device already: moving buffers would untie a head that shares the embedding's weight.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.data, persistent=False)
