"""Memory and speed on a GPU, with wide margins: what fails here is a fast path that is not taken, not a slow afternoon."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
import torch.nn.functional as F

from megalith.engine.engine import Engine
from megalith.engine.flops import flops_per_token, matrix_parameters
from megalith.engine.metrics import Speed, device_name, peak, speed
from megalith.models import presets
from megalith.models.gpt import GPT
from megalith.nn.loss import CrossEntropy
from megalith.optim.config import OptimConfig
from megalith.optim.schedule import make_schedule
from megalith.parallel.apply import build
from megalith.topology.topology import Topology
from tests.device.small import small_batch, small_engine

pytestmark = pytest.mark.device
LENGTH, SAMPLES = 1024, 8


def gpt2(device: torch.device, precision: str) -> Engine:
    topology = Topology.single(device)
    config = presets.get("gpt2-124m", hidden_dropout=0.0)
    optim = OptimConfig(lr=1e-4)
    return Engine(
        build(GPT, config, topology, seed=1, precision=precision),
        topology,
        optim=optim,
        schedule=make_schedule(optim, max_steps=100, global_batch=SAMPLES, sequence_length=LENGTH),
        seed=1,
        precision=precision,
        micro_batch_size=SAMPLES,
    )


def batch(vocabulary: int) -> dict[str, torch.Tensor]:
    text = torch.randint(vocabulary, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return {"tokens": text[:, :-1], "targets": text[:, 1:], "sample": torch.arange(SAMPLES)}


def seconds(call, repeats: int = 5) -> float:
    """Median time of a call that has been warmed up."""
    for _ in range(2):
        call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def head(device: torch.device, rows: int, vocabulary: int, width: int = 768):
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, width, device=device, generator=generator).requires_grad_()
    weight = torch.randn(50304, width, device=device, generator=generator).mul_(0.02).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=device, generator=generator)
    return hidden, weight, targets


def test_the_loss_never_holds_all_logits(gpu):
    rows, vocabulary = 65536, 50257
    hidden, weight, targets = head(gpu, rows, vocabulary, width=256)
    loss = CrossEntropy()
    loss.compute_dtype = torch.bfloat16
    torch.cuda.reset_peak_memory_stats(gpu)
    before = torch.cuda.memory_allocated(gpu)
    loss(hidden[None], weight, targets[None], vocabulary).backward()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated(gpu) - before
    assert hidden.grad is not None
    assert extra < rows * vocabulary * 4 / 4  # a quarter of the logits in fp32


def test_the_loss_equals_torchs(gpu):
    """A vocabulary that no tensor core likes, more rows than a chunk, and some targets that do not count."""
    rows, vocabulary = 6000, 50257
    hidden, weight, targets = head(gpu, rows, vocabulary)
    targets[::7] = -1
    found = CrossEntropy()(hidden[None], weight, targets[None], vocabulary)
    wanted = F.cross_entropy(hidden @ weight[:vocabulary].T, targets, ignore_index=-1, reduction="sum")
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    for left, right in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (found, wanted)), strict=True):
        assert (left - right).abs().max() <= 1e-4 * right.abs().max()


def test_an_odd_vocabulary_costs_no_more_than_a_round_one(gpu):
    def time_of(vocabulary: int) -> float:
        hidden, weight, targets = head(gpu, 16384, vocabulary)
        loss = CrossEntropy()
        loss.compute_dtype = torch.bfloat16
        return seconds(lambda: loss(hidden[None], weight, targets[None], vocabulary).backward())

    assert time_of(50257) < 1.3 * time_of(50304)


def test_forward_and_backward_do_not_wait_for_the_gpu(gpu):
    """The processor runs ahead: nothing is read back before the optimizer step."""
    engine = small_engine(gpu, "bf16-mixed")
    engine.train_step(small_batch())
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.forward_backward(small_batch(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.optimizer_step()


def speed_of(device: torch.device, precision: str) -> Speed:
    """Of optimizer steps, eager."""
    engine, text = gpt2(device, precision), batch(50257)
    per_token = flops_per_token(
        matrix_parameters=matrix_parameters(engine.model.config),
        layers=engine.model.config.num_layers,
        attention_width=engine.model.config.hidden_size,
        length=LENGTH,
    )
    took = seconds(lambda: engine.train_step(text))
    top = peak(device_name(device), precision)
    return speed(SAMPLES * LENGTH, took, per_token=per_token, peak=top)


def test_bf16_is_fast(gpu):
    """Eager, 124M, one micro-batch of 8: faster than fp32, and a tenth of the peak where the peak is known."""
    if not torch.cuda.is_bf16_supported():
        pytest.skip("this GPU has no bf16")
    fast = speed_of(gpu, "bf16-mixed")
    print(f"{fast.tokens_per_second:.0f} tokens/s, {fast.tflops_per_second:.1f} TFLOP/s, MFU {fast.mfu}")
    assert fast.tokens_per_second > speed_of(gpu, "32").tokens_per_second
    assert fast.mfu is None or fast.mfu > 0.1
