"""The settings of Transformers and TRL that a recipe refuses, and why.

They would have no effect here, or one that contradicts how a run works. `rorchat.training.arguments.parse` raises the
reason. Each table is grouped by reason: the names of a group are separated by blanks.
"""

from collections.abc import Mapping

from rorchat.training.optim import ADAMW_BETAS

#: Settings of TRL's commands, of earlier versions of the libraries and of other stages -> what to give in their place.
OTHER_NAMES = {
    "model_name_or_path": "--model",
    "dataset_name": "--sources",
    "warmup_ratio": "--warmup_steps, with a share below 1",
    "lr": "--learning_rate",
    "epochs": "--num_train_epochs",
    "num_epochs": "--num_train_epochs",
    "batch_size": "--per_device_train_batch_size",
    "no_cuda": "--use_cpu true",
    "dtype": "--bf16 or --fp16",
    "torch_dtype": "--bf16 or --fp16",
    **dict.fromkeys(
        ("lora_rank", "lora_r", "lora_alpha", "lora_target_modules", "use_peft"), "--lora_rank, to sft or dpo"
    ),
}


def _by_name(groups: Mapping[str, str]) -> dict[str, str]:
    return {name: reason for reason, names in groups.items() for name in names.split()}


EVERY_STAGE = _by_name(
    {
        # the optimizer and the loss
        "the optimizer is chosen by `optimizer`: adamw, adamw_8bit or muon": "optim optim_args",
        f"AdamW's betas are {ADAMW_BETAS} and its epsilon is 1e-8": "adam_beta1 adam_beta2 adam_epsilon",
        "every parameter is optimized, or those of the LoRA adapter": "optim_target_modules",
        "it needs the logits of a whole batch, which are never held in memory": "label_smoothing_factor",
        "every token has the same weight on every process": "average_tokens_across_devices",
        "its size would depend on how many sequences share a row": "neftune_noise_alpha",
        # memory and speed
        "`gradient_checkpointing` saves that memory, block by block": (
            "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing_kwargs "
            "activation_offloading"
        ),
        "every step reuses the memory of the previous one": "torch_empty_cache_steps",
        "micro-batches are halved automatically when memory runs out": "auto_find_batch_size",
        "rorchat has its own kernels for GPT-2, which are always used": "use_liger_kernel liger_kernel_config",
        "only pretraining compiles the model: batches of other stages differ in shape": (
            "torch_compile torch_compile_backend torch_compile_mode"
        ),
        "training needs no cache, and generation always has one": "use_cache",
        # data
        "the order of rows is determined by the data, see `data_seed`": (
            "train_sampling_strategy length_column_name dataloader_in_order shuffle_dataset"
        ),
        "rows contain only what the model reads": "remove_unused_columns label_names",
        "training batches are always full, and an evaluation reads all of its rows": "dataloader_drop_last",
        "workers are started once, as PyTorch does by default": (
            "dataloader_persistent_workers dataloader_multiprocessing_context"
        ),
        "memory is pinned where there is a GPU": "dataloader_pin_memory",
        "a run resumes after the rows that it has read": "ignore_data_skip",
        # logs and validation
        "NaN is always logged as NaN": "logging_nan_inf_filter",
        "a step whose loss is NaN is skipped, and its rows are written to diverged_rows.jsonl": "debug",
        "metrics.jsonl has the number of tokens and the memory": "include_num_input_tokens_seen skip_memory_metrics",
        "bars are shown on a terminal only, and not at all if TQDM_DISABLE=1 is set": "disable_tqdm",
        "validation has the precision of training, see `bf16` and `fp16`": "bf16_full_eval fp16_full_eval",
        "validation keeps no predictions, only sums of losses or rewards": (
            "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
            "include_for_metrics batch_eval_metrics"
        ),
        "`rorchat evaluate` measures a model": "do_predict",
        # checkpoints and the Hub
        "the best checkpoint is kept, see `rorchat checkpoint list` and `export`": "load_best_model_at_end",
        "the best checkpoint is the one with the lowest validation loss": "metric_for_best_model greater_is_better",
        "checkpoints are for resuming; `rorchat checkpoint export` extracts the model": "save_only_model",
        "a checkpoint is written once, by all processes together": "save_on_each_node",
        "it would restore the request to stop of an interrupted run": "restore_callback_states_from_checkpoint",
        "the same command resumes automatically": "resume_from_checkpoint",
        "SIGTERM already saves a checkpoint at the end of the step": "enable_jit_checkpoint",
        "`rorchat push` verifies and pushes; `mirror` copies checkpoints": (
            "push_to_hub hub_model_id hub_strategy hub_always_push hub_revision"
        ),
        "log in with `hf auth login`": "hub_token",
        # processes
        "give --accelerate_config ddp, fsdp, deepspeed_zero2 or a file of your own to the launcher": (
            "fsdp fsdp_config deepspeed parallelism_config accelerator_config"
        ),
        "processes are connected by NCCL on GPUs and by gloo on CPUs": "ddp_backend",
        "every parameter is used in every step": "ddp_find_unused_parameters ddp_static_graph",
        "the model has no buffers that change": "ddp_broadcast_buffers",
    }
)

PRETRAIN = EVERY_STAGE | _by_name(
    {
        "it follows from `global_batch_tokens`": "gradient_accumulation_steps",
        "the length of pretraining is `train_tokens` or `max_steps`": "num_train_epochs",
        "use `compile`, which compiles everything but the language-model head": (
            "torch_compile torch_compile_backend torch_compile_mode"
        ),
    }
)

_CHAT_STAGE = EVERY_STAGE | _by_name(
    {
        "the model is a stock GPT-2 in float32, without dropout": (
            "model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout"
        ),
    }
)

SFT = _CHAT_STAGE | _by_name(
    {
        "rorchat encodes and packs the rows: conversations do not attend to each other, loss on replies only": (
            "packing packing_strategy eval_packing padding_free assistant_only_loss completion_only_loss "
            "dataset_text_field dataset_kwargs dataset_num_proc pad_to_multiple_of"
        ),
        "rorchat's chat template and control tokens are used: user text cannot become a control token": (
            "chat_template_path eos_token pad_token"
        ),
        "the loss is always the negative log-likelihood of the replies": "loss_type",
        "conversations longer than `max_length` are truncated after a turn": "truncation_mode",
    }
)

DPO = _CHAT_STAGE | _by_name(
    {
        "the reference's log-probabilities are always computed once, at the start": "precompute_ref_log_probs",
        "the reference is the model that the run starts from": (
            "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps"
        ),
        "its weights are sums over the whole vocabulary, which are not computed": "use_weighting",
        "it smooths token labels; use `label_smoothing` for preferences": "label_smoothing_factor",
        "early messages of a prompt are dropped first, then replies are cut to the same maximum": "truncation_mode",
        "batches are computed without padding": "padding_free pad_to_multiple_of",
        "the tokenizer has a pad token": "pad_token",
        "pairs are encoded by rorchat": "dataset_num_proc",
    }
)

GRPO = _CHAT_STAGE | _by_name(
    {
        "every step samples new replies and uses them once, so that a run can resume after any step": (
            "num_iterations steps_per_generation generation_batch_size"
        ),
        # TRL's ratio of the probabilities of a reply in training and in sampling is 1 in the only step that uses it
        "every reply is used once, by the model that has sampled it, so that its importance ratio is 1": (
            "epsilon delta off_policy_mask_threshold sapo_temperature_neg sapo_temperature_pos vespo_k_pos "
            "vespo_lambda_pos vespo_k_neg vespo_lambda_neg"
        ),
        "validation uses one greedy reply per question": "num_generations_eval",
        "replies are sampled by Transformers' generate from the trained model": (
            "use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex "
            "vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port "
            "vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size "
            "vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max "
            "vllm_importance_sampling_clip_min vllm_importance_sampling_cap use_transformers_continuous_batching "
            "transformers_continuous_batching_config use_transformers_paged ds3_gather_for_generation"
        ),
        "sampling is set by `temperature`, `top_p`, `top_k`, `min_p` and `repetition_penalty`": (
            "generation_kwargs cache_implementation"
        ),
        "prompts are encoded by rorchat, without tools": "chat_template_kwargs max_tool_calling_iterations",
        "a batch is as long as its longest row": "pad_to_multiple_of",
        "rewards are in metrics.jsonl, replies to `sample_prompts` in samples.jsonl": (
            "log_completions log_completions_hub_repo log_multimodal log_unique_prompts num_completions_to_print"
        ),
        "the reference is the model that the run starts from": (
            "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps"
        ),
        "checkpoints do not contain its state; use `entropy_coef`": (
            "use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target"
        ),
        "the whole model is trained in float32": "cast_lm_head_to_fp32",
    }
)
