#!/usr/bin/env bash
# GPT 345M on 8 GPUs: matrices shared by 2, layers by 2, and two such copies. Megatron-LM's
# examples/pretrain_gpt_distributed_with_mp.sh. On several machines: as pretrain_distributed.sh.
#
#   GPUS=8 DATA=my-gpt2_text_document VOCAB=… MERGES=… ./pretrain_distributed_with_mp.sh [key=value …]
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
  model.tensor_model_parallel_size=2 \
  model.pipeline_model_parallel_size=2 \
  model.sequence_parallel=true \
  model.micro_batch_size=4 \
  model.global_batch_size=16 \
  "$@"
