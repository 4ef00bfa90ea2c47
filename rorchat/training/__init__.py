"""Training: pretrain, sft, dpo and grpo, in Transformers' and TRL's trainers."""
