"""Token files: `PREFIX.bin` (tokens back to back) with `PREFIX.idx` (where each item and document lies), as Megatron's."""
