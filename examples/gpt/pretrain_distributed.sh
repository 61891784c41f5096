#!/usr/bin/env bash
# GPT 345M on 8 GPUs, each with a copy of the model: Megatron-LM's examples/pretrain_gpt_distributed.sh.
# On several machines: the same on each, with NODES=2 MEETING=first-machine:29400.
#
#   GPUS=8 DATA=my-gpt2_text_document VOCAB=… MERGES=… ./pretrain_distributed.sh [key=value …]
set -euo pipefail
HERE=$(dirname "$0")
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # so that an agent may join after a restart

exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-8}" --max-restarts "${RESTARTS:-3}" \
  --rdzv-id gpt_345m --rdzv-backend c10d --rdzv-endpoint "${MEETING:-localhost:29400}" \
  -m megalith pretrain gpt --config "$HERE/345m.yaml" \
  model.data.data_prefix="[${DATA:-my-gpt2_text_document}]" \
  model.tokenizer.vocab_file="${VOCAB:-gpt2-vocab.json}" \
  model.tokenizer.merge_file="${MERGES:-gpt2-merges.txt}" \
  exp_manager.explicit_log_dir="${RUN:-runs/gpt_345m}" \
  model.micro_batch_size=8 \
  model.global_batch_size=64 \
  "$@"
