#!/usr/bin/env bash
# GPT 345M on one GPU: Megatron-LM's examples/pretrain_gpt.sh.
#
#   DATA=my-gpt2_text_document VOCAB=gpt2-vocab.json MERGES=gpt2-merges.txt ./pretrain.sh [key=value …]
set -euo pipefail
HERE=$(dirname "$0")

exec megalith pretrain gpt --config "$HERE/345m.yaml" \
  model.data.data_prefix="[${DATA:-my-gpt2_text_document}]" \
  model.tokenizer.vocab_file="${VOCAB:-gpt2-vocab.json}" \
  model.tokenizer.merge_file="${MERGES:-gpt2-merges.txt}" \
  exp_manager.explicit_log_dir="${RUN:-runs/gpt_345m}" \
  trainer.devices=1 \
  model.micro_batch_size=4 \
  model.global_batch_size=8 \
  "$@"
