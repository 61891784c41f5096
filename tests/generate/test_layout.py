"""Keys and options of a command that reads a model: how many processes, where, and every way in which that cannot be."""

import pytest

from megalith.errors import ConfigError
from megalith.generate.layout import read_layout
from megalith.topology.sizes import Sizes

TENSOR, PIPELINE = "model.tensor_model_parallel_size", "model.pipeline_model_parallel_size"


def problems(call):
    with pytest.raises(ConfigError) as error:
        call()
    return " ".join(str(p) for p in error.value.problems)


def test_nothing_said_is_one_process():
    layout = read_layout()
    assert (layout.wanted, layout.to_spawn(0), layout.to_spawn(8)) == (1, 0, 0)
    assert layout.sizes(1) == Sizes()
    assert (layout.device(0), layout.precision, layout.timeout) == ("auto", "auto", 1800)


def test_sizes():
    layout = read_layout(["model.tensor_model_parallel_size=2"])
    assert layout.to_spawn(0) == 2
    assert layout.sizes(2) == Sizes(tensor=2)
    assert layout.sizes(6) == Sizes(tensor=2, replicate=3)  # under a launcher
    layout = read_layout(["trainer.devices=4", "tensor_model_parallel_size=2", "trainer.process_timeout=60"])
    assert layout.to_spawn(0) == 4
    assert layout.sizes(4) == Sizes(tensor=2, replicate=2)
    assert layout.timeout == 60
    assert read_layout(["trainer.devices=2", "trainer.num_nodes=2"]).sizes(4) == Sizes(replicate=4)
    assert read_layout(["trainer.devices=-1", "model.tensor_model_parallel_size=2"]).wanted == 2


def test_sizes_of_a_pipeline():
    layout = read_layout([f"{PIPELINE}=2"])
    assert layout.to_spawn(0) == 2
    assert layout.sizes(2) == Sizes(pipeline=2)
    layout = read_layout([f"{PIPELINE}=3", f"{TENSOR}=2", "model.pipeline_layers=[2,1,1]"])
    assert layout.to_spawn(0) == 6
    assert layout.sizes(12) == Sizes(tensor=2, pipeline=3, replicate=2, layers=(2, 1, 1))
    split = "pipeline_model_parallel_split_rank"
    assert read_layout([f"{PIPELINE}=3", f"model.{split}=2"]).sizes(3).pipeline_split == 2
    assert read_layout([f"{PIPELINE}=3", f"{split}=1"]).sizes(3).pipeline_split == 1
    for nothing in ("0", "-1", "null"):
        assert read_layout([f"{PIPELINE}=2", f"model.{split}={nothing}"]).sizes(2) == Sizes(pipeline=2)
    assert read_layout([f"model.{split}=1"]).sizes(1) == Sizes()


@pytest.mark.parametrize(
    ("keys", "device", "expected"),
    [
        ([], "cpu", ["cpu", "cpu"]),
        ([], "cuda:1", ["cuda:1", "cuda:1"]),
        (["trainer.devices=2"], "cuda", ["cuda", "cuda"]),
        (["trainer.devices=[2,3]"], "auto", ["cuda:2", "cuda:3"]),
        (["trainer.devices=2,3"], "cuda", ["cuda:2", "cuda:3"]),
        (["trainer.accelerator=gpu"], "auto", ["cuda", "cuda"]),
        (["trainer.accelerator=gpu", "trainer.devices=1"], "cuda:0", ["cuda:0", "cuda:0"]),
    ],
)
def test_devices(keys, device, expected):
    layout = read_layout(keys, device=device)
    assert [layout.device(rank) for rank in (0, 1)] == expected


def test_precision():
    assert read_layout(["trainer.precision=bf16"]).precision == "bf16-mixed"
    assert read_layout(["trainer.precision=32"], precision="fp32").precision in ("32", "fp32")
    assert read_layout([], precision="64").precision == "64"


@pytest.mark.parametrize(
    ("keys", "options", "words"),
    [
        (["trainer.precision=32"], {"precision": "64"}, "--precision, trainer.precision: 64 and 32"),
        (["trainer.accelerator=gpu"], {"device": "cpu"}, "--device, trainer.accelerator: cpu and gpu"),
        (["trainer.accelerator=cpu"], {"device": "cuda:0"}, "--device, trainer.accelerator: cuda:0 and cpu"),
        (["trainer.devices=2"], {"device": "cuda:1"}, "--device, trainer.devices: cuda:1 and 2"),
        (["trainer.devices=[0,1]"], {"device": "cpu"}, "--device, trainer.devices"),
        (["trainer.devices=[0]", "trainer.accelerator=cpu"], {}, "a list of GPU numbers, but accelerator is cpu"),
        ([f"{PIPELINE}=2", "model.virtual_pipeline_model_parallel_size=2"], {}, "2: a process reads with one pipeline stage"),
        ([f"{PIPELINE}=2", "model.pipeline_layers=[1,2,3]"], {}, "3 numbers of layers (1, 2, 3) for 2 stages"),
        (["pipeline_model_parallel_size=0"], {}, PIPELINE),
        (["model.context_parallel_size=2"], {}, "use model.tensor_model_parallel_size"),
        (["model.tensor_model_paralel_size=2"], {}, "did you mean model.tensor_model_parallel_size?"),
        (["trainer.device=2"], {}, "did you mean trainer.devices?"),
        (["trainer.devices=0"], {}, "0 devices cannot read a model"),
        (["trainer.devices=many"], {}, "trainer.devices"),
        (["model.tensor_model_parallel_size=0"], {}, "model.tensor_model_parallel_size"),
        (["cat"], {}, "is not key=value"),
        (["cat"], {}, "quote a text of several words"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told(keys, options, words):
    assert words in problems(lambda: read_layout(keys, **options))


def test_all_problems_at_once():
    said = problems(
        lambda: read_layout(["model.virtual_pipeline_model_parallel_size=2", "trainer.devises=2"])
    )
    assert "a process reads with one pipeline stage" in said
    assert "did you mean trainer.devices?" in said


def test_keys_of_training_that_ask_for_nothing_here():
    layout = read_layout(["model.pipeline_model_parallel_size=1", "model.sequence_parallel=true"])
    assert (layout, layout.notices) == (read_layout(), ())


def test_processes_that_cannot_be_started():
    def start(gpus, *keys, **options):
        return problems(lambda: read_layout(keys, **options).to_spawn(gpus))

    three = start(0, "trainer.devices=3", "model.tensor_model_parallel_size=2")
    assert "3 processes, but the model is shared by 2" in three
    assert "trainer.devices ∈ {2, 4, 6, …}" in three
    both = start(0, "trainer.devices=6", f"{TENSOR}=2", f"{PIPELINE}=2")
    assert "6 processes, but the model is shared by 4" in both
    assert "(tensor_model_parallel_size × pipeline_model_parallel_size)" in both
    assert "trainer.devices ∈ {4, 8, 12, …}" in both
    assert f"{TENSOR} × {PIPELINE}: 4 GPUs asked for, this machine has 2" in start(
        2, f"{TENSOR}=2", f"{PIPELINE}=2"
    )
    none = start(0, "trainer.devices=2", "trainer.accelerator=gpu")
    assert "trainer.devices: 2 GPUs asked for, this machine has 0" in none
    assert "trainer.accelerator=cpu" in none
    assert "model.tensor_model_parallel_size: 4 GPUs asked for, this machine has 2" in start(
        2, "model.tensor_model_parallel_size=4"
    )
    assert "GPU 5 asked for, this machine has 4" in start(4, "trainer.devices=[0,5]")
    assert "--device, trainer.accelerator: 1 GPU asked for, this machine has 0" in start(0, device="cuda")
    assert "--device, trainer.devices: GPU 3 asked for, this machine has 2" in start(2, device="cuda:3")
    assert "torchrun or srun" in start(0, "trainer.num_nodes=2")


def test_processes_that_a_launcher_started():
    keys = ["trainer.devices=2", "model.tensor_model_parallel_size=2"]
    assert "2 asked for, but the launcher started 4" in problems(lambda: read_layout(keys).sizes(4))
    assert "3 processes, but the model is shared by 2" in problems(lambda: read_layout(keys[1:]).sizes(3))


def test_one_text_is_not_shared_out_among_copies():
    layout = read_layout(["model.tensor_model_parallel_size=2"])
    layout.needs_one_copy(2, "one text")
    said = problems(lambda: layout.needs_one_copy(4, "one text"))
    assert "trainer.devices=2, or model.tensor_model_parallel_size=4" in said
    said = problems(lambda: read_layout([f"{PIPELINE}=2"]).needs_one_copy(4, "one text"))
    assert "one text is the work of 2 (pipeline_model_parallel_size)" in said
    assert "trainer.devices=2, or model.tensor_model_parallel_size=2" in said
