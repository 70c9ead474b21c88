"""What a run on checkpoints is said to take, and that what it does not use any more is not in memory."""

from __future__ import annotations

import gc
import resource
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rebasin.files import config_dir
from rebasin.jobs.configuration import explain
from rebasin.matching.straight_through import straight_through
from rebasin.models import tiny_sd
from rebasin.tasks.around import Around
from rebasin.tasks.checkpoint_costs import Pass, Run, forward_pass
from rebasin.tensors.free_memory import free_memory
from rebasin.types import arguments_of


def test_a_pass_on_the_meta_device_counts_what_a_real_one_does() -> None:
    unet, args = tiny_sd.load_unet("seed0").float(), (torch.randn(1, 4, 8, 8), torch.tensor([7]))
    states = torch.randn(1, 77, unet.config["cross_attention_dim"])
    own, kept = {p.untyped_storage().data_ptr() for p in unet.parameters()}, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with saved_tensors_hooks(keep, lambda t: t):
        unet(*args, states)
    # The counter does not know the CPU's own kernel of attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        unet(*args, states)
    found = forward_pass(unet, (*args, states[:, :5]), {}, 8, torch.float32)
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert found.kept == pytest.approx(sum(size for size, _ in kept.values()), rel=0.1)
    assert forward_pass(unet, (*args, states), {}, 8, torch.bfloat16).kept == pytest.approx(found.kept / 2)
    assert forward_pass(unet, (*args, states), {}, 16, torch.float32).flops > 3 * found.flops


def test_attention_keeps_no_matrix_of_scores() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, value=x)

    x = torch.randn(1, 2, 300, 4, requires_grad=True)
    found = forward_pass(Attention(), (x,), {}, None, torch.float32)
    assert found.flops == 2 * 2 * 2 * 300 * 300 * 4 and found.kept < 300 * 300


def told(*options: str, searches: bool = True) -> Run:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        own = ["model=checkpoint", "objective=distillation", "objective.batch_size=2", *options]
        cfg = compose("config", own)
    takes = arguments_of(straight_through) if searches else {}
    return Run(cfg, takes, None, 10**9, 10**7, torch.float32, (5e8, 4e8), Pass(1e12, 3e9, 5e7), 512, True)


def test_memory_is_counted_by_copies_of_the_model() -> None:
    plain, own = told("algo=weight_matching", searches=False), told("algo=ste")
    assert 8e9 < plain.memory() < 13e9  # the model, and its own weights to be put back
    # A, B, the midpoint, its gradient; auxiliary weights and two moments; activations of two pictures
    assert 34e9 < own.memory() < 40e9
    sgd, checkpointed = told("algo=ste", "algo.optimizer=sgd"), told("algo=ste", "algo.checkpointing=true")
    assert own.memory() - sgd.memory() == pytest.approx(4e9)
    assert own.memory() - checkpointed.memory() == pytest.approx(0.8 * 6e9)
    assert own.memory() - replace(own, dtype=torch.bfloat16).memory() == pytest.approx(8e9)


def test_memory_of_information_is_counted_for_every_model() -> None:
    plain, fisher = (
        told("algo=weight_matching", merge, searches=False).memory()
        for merge in ("merge=weighted_sum", "merge=fisher")
    )
    three = told("algo=naive", "merge=fisher", "+model.files=[a,b,c]", searches=False).memory()
    assert fisher - plain > 8e9  # a float32 for each weight of both models, at least
    assert three - fisher == pytest.approx(4e9)


def test_time_is_counted_by_passes() -> None:
    plain, rate = (
        told("algo=weight_matching", "evaluate.points=3", "objective.samples=4", searches=False),
        1e12,
    )
    # Two curves of three points and the merge, on two held-out samples.
    assert plain.seconds(rate) == pytest.approx(14 / 0.6)
    few, more = (told("algo=ste", "algo.refine=0", f"algo.steps={n}").seconds(rate) for n in (10, 20))
    assert 10 * 2 * 3 < (more - few) * 0.6 < 10 * 2 * 3 + 4 * 500  # a gradient counts as three


def test_text_encoders_go_when_nobody_uses_them() -> None:
    pipeline, made = tiny_sd.load_pipeline("seed0"), []
    encoder, pipeline.text_encoder = pipeline.text_encoder, None

    def load(name: str) -> nn.Module:
        module = type(encoder)(encoder.config).eval()
        module.load_state_dict(encoder.state_dict())
        made.append(weakref.ref(module))
        return module

    around = Around(pipeline, None, ["text_encoder"], load)
    texts = ["a handwritten seven", ""]
    assert torch.equal(around.states(texts), Around(tiny_sd.load_pipeline("seed0")).states(texts))  # type: ignore[arg-type]
    gc.collect()
    assert len(made) == 1 and made[0]() is None
    first, second = around.holding(), around.holding(unet=None)
    assert len(made) == 2 and first.text_encoder is second.text_encoder is made[1]()
    assert pipeline.text_encoder is None and second.unet is None


def test_free_memory_is_what_the_limits_of_the_process_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    cpu = torch.device("cpu")
    assert free_memory(cpu, tmp_path) is None
    write("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:   8000000 kB\n")
    assert free_memory(cpu, tmp_path) == 8192e6
    write("proc/self/cgroup", "4:cpu,memory:/a/b\n0::/job/step\n")
    assert free_memory(cpu, tmp_path) == 8192e6
    write("sys/fs/cgroup/job/step/memory.max", "max\n")  # the step has no limit of its own, the job has one
    write("sys/fs/cgroup/job/memory.max", "7000000000\n")
    write("sys/fs/cgroup/job/memory.current", "3000000000\n")
    write("sys/fs/cgroup/job/memory.stat", "file 9\ninactive_file 1000000000\n")
    assert free_memory(cpu, tmp_path) == 5e9
    write(
        "sys/fs/cgroup/memory/memory.limit_in_bytes", "4000000000\n"
    )  # of a container, whose path is another
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "6000000\n")
    write("sys/fs/cgroup/memory/memory.stat", "total_inactive_file 0\n")
    assert free_memory(cpu, tmp_path) == 3994e6
    write("proc/self/statm", "1000 1 1\n")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (3_000_000_000, -1))
    assert free_memory(cpu, tmp_path) == 3e9 - 1000 * resource.getpagesize()


def test_the_end_of_the_memory_is_one_sentence() -> None:
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("can't allocate memory: 1"),
    ):
        assert explain(error).startswith("The memory did not suffice; a smaller batch_size")
