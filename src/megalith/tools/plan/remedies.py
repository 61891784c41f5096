"""What would make a plan fit: keys changed one at a time, each rehearsed like the plan itself, and at last several together.

In the order of what they cost in time: sharing first, smaller micro-batches, then computing again. Suggests nothing that it has
not tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from megalith.parallel.memory import Recompute
from megalith.tools.plan.estimate import estimate
from megalith.tools.plan.plan import TIGHT, Plan, on_device, stages_to_look_at
from megalith.tools.plan.rehearsal import Case
from megalith.topology.sizes import Divisible, Sizes

MOST = 3
"""Remedies that are offered."""


@dataclass(frozen=True)
class Remedy:
    """Keys to type, and the bytes of the fullest process with them."""

    keys: tuple[str, ...]
    need: int
    fits: bool


def remedies(plan: Plan, say: Callable[[str], None] = lambda text: None) -> list[Remedy]:
    """Single changes that fit; where none does, one change on top of the other until it fits or there are no more."""
    room = TIGHT * plan.device.memory
    found: list[Remedy] = []
    for keys, case in changes(plan.case):
        say(" ".join(keys))
        tried = _try(keys, case, room)
        if tried.fits and all(tried.need != other.need for other in found):
            found.append(tried)
        if len(found) == MOST:
            break
    return found or _together(plan.case, room, say)


def _together(case: Case, room: float, say: Callable[[str], None]) -> list[Remedy]:
    """The best that can be had with all of it; still too much where the devices are too few."""
    keys: tuple[str, ...] = ()
    tried: Remedy | None = None
    for kind in (_zero, _sequence, _micro_batch, _recompute):
        for more, changed in list(kind(case))[-1:]:  # of its kind, the one that saves most
            keys, case = (*keys, *more), changed
            say(" ".join(keys))
            tried = _try(keys, case, room)
            if tried.fits:
                return [tried]
    return [tried] if tried is not None else []


def _try(keys: tuple[str, ...], case: Case, room: float) -> Remedy:
    need = max(on_device(estimate(case, stage), case.sizes) for stage in stages_to_look_at(case))
    return Remedy(keys, need, need <= room)


Change = tuple[tuple[str, ...], Case]


def changes(case: Case) -> Iterator[Change]:
    """Legal changes of one thing, cheapest first."""
    for kind in (_sequence, _zero, _micro_batch, _recompute, _tensor, _pipeline):
        yield from kind(case)


def _sequence(case: Case) -> Iterator[Change]:
    if case.sizes.tensor > 1 and not case.sizes.sequence_parallel:
        yield from _legal(
            ("model.sequence_parallel=true",), case, replace(case.sizes, sequence_parallel=True)
        )


def _zero(case: Case) -> Iterator[Change]:
    sizes = case.sizes
    for stage in range(sizes.zero_stage + 1, 4) if sizes.data > 1 else ():
        among = {} if sizes.zero_stage else {"shard": sizes.data, "replicate": 1}
        yield from _legal((f"model.zero_stage={stage}",), case, replace(sizes, zero_stage=stage, **among))


def _micro_batch(case: Case) -> Iterator[Change]:
    size = case.micro_batch
    smaller = [n for n in range(size - 1, 0, -1) if size % n == 0]
    for n in dict.fromkeys([*smaller[:1], *smaller[-1:]]):
        changed = replace(case, micro_batch=n, micro_batches=case.micro_batches * size // n)
        yield from _legal((f"model.micro_batch_size={n}",), changed, case.sizes)


def _recompute(case: Case) -> Iterator[Change]:
    if case.recompute is None or case.recompute.granularity == "selective":
        yield ("model.activations_checkpoint_granularity=full",), replace(case, recompute=Recompute())


def _tensor(case: Case) -> Iterator[Change]:
    size = case.sizes.tensor * 2
    if size <= 8:  # a machine's worth: beyond it tensor parallelism crawls
        yield from _less_data((f"model.tensor_model_parallel_size={size}",), case, tensor=size)


def _pipeline(case: Case) -> Iterator[Change]:
    size = case.sizes.pipeline * 2
    yield from _less_data((f"model.pipeline_model_parallel_size={size}",), case, pipeline=size)


def _less_data(keys: tuple[str, ...], case: Case, **axis: int) -> Iterator[Change]:
    """Twice as many processes for one copy of the model: half as many copies."""
    sizes = case.sizes
    if sizes.data % 2 or sizes.layers is not None:
        return
    if sizes.replicate % 2 == 0:
        changed = replace(sizes, replicate=sizes.replicate // 2, **axis)
    else:
        changed = replace(sizes, shard=sizes.shard // 2, **axis)
    yield from _legal(keys, replace(case, micro_batches=case.micro_batches * 2), changed)


def _legal(keys: tuple[str, ...], case: Case, sizes: Sizes) -> Iterator[Change]:
    model = case.model
    numbers = Divisible(
        layers=model.depths, heads=model.num_attention_heads, kv_heads=model.kv_heads, ffn=model.ffn_size,
        vocab=model.padded_vocab_size, length=(case.length, case.decoder_length) if case.decoder_length else case.length,
        micro_batch=case.micro_batch, global_batch=case.micro_batch * case.micro_batches * sizes.data,
    )  # fmt: skip
    if not sizes.problems(numbers):
        yield keys, replace(case, sizes=sizes)
