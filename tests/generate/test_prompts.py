"""Prompts of tasks in generation: what tuning had said, rows of all tasks in one batch, and everything else that looks at tokens."""

from __future__ import annotations

import json

import pytest
import torch

import megalith
from megalith.adapt.adapter import Adapter
from megalith.adapt.artefact import open_adapter, save
from megalith.adapt.export import export
from megalith.adapt.lora import LoRA
from megalith.adapt.method import Tag
from megalith.checkpoint.native import Checkpointer
from megalith.errors import CheckpointError, ConfigError, DataError
from megalith.generate.adapting import load_adapted, use
from megalith.generate.asking import ask
from megalith.generate.jobs import Options, continue_all
from megalith.generate.loading import load_model
from megalith.generate.manner import Manner
from megalith.generate.prompting import Tagged
from megalith.generate.sampling import Sampling
from megalith.generate.text import stream
from megalith.parallel.apply import build
from megalith.topology.sizes import Sizes
from megalith.topology.topology import Topology
from tests.generate import families, ranks
from tests.generate.tiny import VARIANTS, tiny_loaded, tiny_tokenizer
from tests.generate.tuned import ROWS, completions, lines, said_in_training, saved, tune

FAMILIES = ["gpt", "t5"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A function: family → (run folder of the base, model in training, adapter with the tags a and b, its folder)."""
    made = {}

    def get(family):
        if family not in made:
            run = tmp_path_factory.mktemp(family)
            if family == "gpt":
                ranks.save_shared(str(run), "gpt2", tiny_tokenizer(run / "tokenizer").vocab_size, Sizes())
            else:
                families.save_family(run, family)
            model, adapter = tune(run, {"a": 4, "b": 3})
            made[family] = run, model, saved(adapter, run / "ab"), run / "ab"
        return made[family]

    return get


def rows_of(found):
    return [json.loads(line) for line in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_said_in_training_is_said_afterwards(tuned, family):
    run, model, adapter, folder = tuned(family)
    loaded = load_adapted(run, [folder], precision="64")
    expected = [said_in_training(model, adapter, row, loaded, 7) for row in ROWS]
    assert len({tuple(tokens) for tokens in expected}) > 4  # prompts and texts make a difference
    assert expected[0] != expected[1] != expected[2]
    cached, again = lines(loaded), lines(loaded, recompute=True)
    assert [row["tokens"] for row in rows_of(cached)] == expected
    assert [row["tokens"] for row in rows_of(again)] == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "sampling",
    [{}, {"repetition_penalty": 1.4}, {"no_repeat_ngram": 2}, {"temperature": 1.3, "seed": 4}, {"beams": 3}],
    ids=str,
)
def test_rows_of_all_tasks_in_one_batch_are_those_of_each_alone(tuned, family, sampling):
    run, _, _, folder = tuned(family)
    loaded = load_adapted(run, [folder], precision="64")
    together, alone = (rows_of(lines(loaded, batch_size=size, **sampling)) for size in (16, 1))
    for one, other in zip(together, alone, strict=True):
        assert one.pop("token_logprobs") == pytest.approx(other.pop("token_logprobs"), abs=2e-6)
        assert one == other
        assert all(token < loaded.model.config.vocab_size for token in one["tokens"])


def test_lines_say_what_is_documented(tuned):
    run, _, _, folder = tuned("gpt")
    found = rows_of(lines(load_adapted(run, [folder], precision="64"), ROWS[:2], tokens_to_generate=3))
    for row, line in zip(ROWS, found, strict=False):
        assert list(line) == ["prompt_tag", "text", "completion", "tokens", "token_logprobs", "finish_reason"]
        assert (line["prompt_tag"], line["text"]) == (row.tag, "the cat")
        assert len(line["tokens"]) == len(line["token_logprobs"]) == 3
        assert line["finish_reason"] == "length"


def test_a_row_without_a_tag_is_the_model_alone(tuned):
    run, _, _, folder = tuned("gpt")
    loaded = load_adapted(run, [folder], precision="64")
    plain = list(
        continue_all(load_model(run, precision="64"), ["the cat"], Sampling(tokens_to_generate=7), Options())
    )
    assert json.loads(lines(loaded)[1])["tokens"] == plain[0].tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_task_leaves_the_first_ones_lines_byte_for_byte(tuned, tmp_path, family):
    run, _, adapter, folder = tuned(family)
    _, more = tune(run, {"c": 5}, earlier=adapter)
    more = saved(more, tmp_path / "abc")
    assert more.names == ("a", "b", "c")
    for name, tensor in adapter.tensors.items():
        assert torch.equal(more.tensors[name], tensor)
    first = lines(load_adapted(run, [folder], precision="64"))
    assert lines(load_adapted(run, [tmp_path / "abc"], precision="64")) == first
    both = load_adapted(run, [folder, saved(tune(run, {"d": 2})[1], tmp_path / "d").path], precision="64")
    assert lines(both) == first
    assert both.prompting.adapter.names == ("a", "b", "d")


@pytest.mark.parametrize("sizes", [Sizes(tensor=2), Sizes(pipeline=2), Sizes(tensor=2, pipeline=2)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_any_layout(tuned, rank_pool, family, sizes):
    run, _, _, folder = tuned(family)
    expected = rows_of(completions(str(run), [str(folder)]))
    for found in rank_pool.run(completions, sizes.world, str(run), [str(folder)], sizes):
        for line, wanted in zip(rows_of(found), expected, strict=True):
            assert line.pop("token_logprobs") == pytest.approx(wanted["token_logprobs"], abs=2e-6)
            assert line == {name: value for name, value in wanted.items() if name != "token_logprobs"}


def test_other_prompts_without_the_model_being_read_again(tuned, tmp_path):
    run, _, _, folder = tuned("gpt")
    other = saved(tune(run, {"a": 2, "b": 6}, steps=1)[1], tmp_path / "other")
    loaded = megalith.load(run, precision="64", prompts=[folder])
    table = loaded.model.token_embedding.weight.data_ptr()
    before = lines(loaded)
    swapped = megalith.use_prompts(loaded, [tmp_path / "other"])
    assert swapped.model is loaded.model
    assert swapped.model.token_embedding.weight.data_ptr() == table
    found = lines(swapped)
    assert found == lines(load_adapted(run, [other], precision="64"))
    assert [one == two for one, two in zip(found, before, strict=True)] == [row.tag is None for row in ROWS]
    assert lines(megalith.use_prompts(swapped, [folder])) == before
    alone = use(swapped, [])
    assert alone.prompting is None
    assert alone.model.prompts is None


def test_a_text_streams_without_virtual_tokens(tuned):
    run, _, _, folder = tuned("gpt")
    loaded = load_adapted(run, [folder], precision="64")
    *pieces, last = stream(loaded, ROWS[3], Sampling(tokens_to_generate=7))
    assert "".join(pieces) == last.text == json.loads(lines(loaded)[3])["completion"]


def test_the_end_of_the_positions_counts_virtual_tokens(tuned):
    run, _, _, folder = tuned("gpt")
    loaded = load_adapted(run, [folder], precision="64")
    model, rows = loaded.model, [Tagged("a", {"text": "the cat"}), Tagged(None, {"text": "the cat"})]
    read = len(loaded.tokenizer.encode("the cat"))
    tagged, plain = rows_of(lines(loaded, rows, tokens_to_generate=99))
    assert tagged["finish_reason"] == plain["finish_reason"] == "positions"
    assert len(tagged["tokens"]) == 48 - 4 - read == len(plain["tokens"]) - 4
    assert model.config.max_position_embeddings == 48
    long = "a " * 60
    with pytest.raises(DataError, match="its prompt 4 virtual ones; the model reads 47 at most"):
        ask(loaded, Tagged("a", {"text": long}))


def test_a_tag_that_is_not_there(tuned):
    run, _, _, folder = tuned("gpt")
    with pytest.raises(DataError, match="asks for the prompt 'z'; there are a, b"):
        ask(load_adapted(run, [folder], precision="64"), Tagged("z", {"text": "the"}))
    with pytest.raises(DataError, match="no prompts were given"):
        ask(load_model(run, precision="64"), Tagged("a", {"text": "the"}))


def test_prompts_of_another_base(tuned, tmp_path):
    _, _, _, folder = tuned("gpt")
    other = tmp_path / "other"
    vocabulary = tiny_tokenizer(other / "tokenizer").vocab_size
    ranks.save_shared(str(other), "llama", vocabulary, Sizes())
    with pytest.raises(CheckpointError, match="made for another base model"):
        load_adapted(other, [folder], precision="64")
    forced = load_adapted(other, [folder], precision="64", force=True)
    assert "it is used because you said so" in forced.notices[-1]
    assert len(lines(forced)) == len(ROWS)


def test_a_template_places_virtual_tokens_within_the_text(tuned):
    run, _, adapter, _ = tuned("gpt")
    task = {
        "prompt_template": "<|VIRTUAL_PROMPT_0|>{text}<|VIRTUAL_PROMPT_1|> on{answer}", "virtual_token_splits": [3, 1],
        "answer_field": "answer", "before": [7],
    }  # fmt: skip
    placed = Adapter(**{**vars(adapter), "tasks": {"a": task}})
    loaded = load_adapted(run, [placed], precision="64")
    v, encode = loaded.model.config.vocab_size, loaded.tokenizer.encode
    asked = ask(loaded, Tagged("a", {"text": "the cat"}))
    assert asked.tokens == [v, v + 1, v + 2, 7, *encode("the cat"), v + 3, *encode(" on")]
    assert asked.context == tuple(encode(" on"))
    assert ask(loaded, Tagged("b", {"text": "the"})).tokens == [v + 4, v + 5, v + 6, *encode("the")]
    with pytest.raises(DataError, match="has no text, which a needs"):
        ask(loaded, Tagged("a", {"sentence": "the cat"}))


def test_the_last_field_of_a_template_is_the_answer_where_none_is_named(tuned):
    """As in training: it is what the model is to say, so a row need not have it, and what it has is not read."""
    run, _, adapter, _ = tuned("gpt")
    task = {"prompt_template": "<|VIRTUAL_PROMPT_0|>{text} on{label}.", "answer_field": ""}
    loaded = load_adapted(run, [Adapter(**{**vars(adapter), "tasks": {"a": task}})], precision="64")
    v = loaded.model.config.vocab_size
    for label in ({}, {"label": " the mat"}):
        asked = ask(loaded, Tagged("a", {"text": "the cat", **label}))
        assert asked.tokens == [*range(v, v + 4), *loaded.tokenizer.encode("the cat on")]


def test_the_answer_of_a_row_is_not_shown_with_what_was_asked(tuned):
    run, _, adapter, _ = tuned("gpt")
    task = {"prompt_template": "<|VIRTUAL_PROMPT_0|>{who} {what}:{answer}"}
    loaded = load_adapted(run, [Adapter(**{**vars(adapter), "tasks": {"a": task}})], precision="64")
    assert (
        ask(loaded, Tagged("a", {"answer": "yes", "what": "sat", "who": "the cat"})).prompt == "the cat sat"
    )
    with pytest.raises(DataError, match=r"has no what, which a needs\n.*as rows of --input-file do"):
        ask(loaded, Tagged("a", {"who": "the cat"}))


def test_what_a_decoder_is_made_to_say_first_is_said_once(tuned):
    """BART's samples begin with </s> <s>; when it writes, <s> is forced behind </s>."""
    _, _, adapter, folder = tuned("t5")
    said = Adapter(**{**vars(adapter), "tasks": {"a": {"before": [4], "behind": [6], "start": [9, 7]}}})
    loaded = load_adapted(folder.parent, [said], precision="64")
    words = loaded.tokenizer.encode("the cat")
    for manner, start in ((Manner(start=(9,), forced=(7, 9)), (9,)), (Manner(start=(1,)), (9, 7))):
        found = loaded.prompting.read(ROWS[0], loaded.tokenizer, manner, two_sides=True)
        v = loaded.model.config.vocab_size
        assert found.tokens == [v, v + 1, v + 2, v + 3, 4, *words, 6]
        assert (found.start, found.virtual) == (start, 4)
    other = loaded.prompting.read(ROWS[2], loaded.tokenizer, Manner((5,), (8,), (1,)), two_sides=True)
    assert (other.tokens[3:], other.start) == (
        [5, *words, 8],
        (1,),
    )  # of a tag that says nothing: the model's own manner


def test_a_tuning_runs_own_checkpoints_are_no_model(tuned, tmp_path):
    run, *_ = tuned("gpt")
    loaded = load_model(run, precision="64")
    state = {**loaded.state, "tuning": {"method": "soft-prompt"}}
    Checkpointer(tmp_path / "checkpoints", Topology.single("cpu")).save(
        7, {"model.prompts.tables.0.tokens": torch.ones(2, 32)}, state, config_yaml=""
    )
    with pytest.raises(CheckpointError, match="it holds what a tuning trains, not the model"):
        load_model(tmp_path, precision="64")


def test_a_prompt_without_effect_is_told(tmp_path):
    loaded = tiny_loaded(tmp_path, **VARIANTS["llama"])
    draw = torch.Generator().manual_seed(0)
    table = torch.randn(3, 32, generator=draw, dtype=torch.float64)
    adapter = Adapter("soft-prompt", "gpt", {"prompts.0.tokens": table}, (Tag("x", 3),), path="x")
    assert use(loaded, [adapter]).notices == ()
    with torch.no_grad():
        for block in loaded.model.blocks.values():
            block.attention.out.weight.zero_()  # nothing reaches a token from those before it
    (said,) = use(loaded, [adapter]).notices
    assert said.startswith("x: x changes no logit")


def test_lora_is_merged_when_the_model_is_loaded(tuned, tmp_path):
    run, *_ = tuned("gpt")
    plain = load_model(run, precision="64")
    method = LoRA(rank=2, alpha=8.0, targets=("all-linear",))
    draw = torch.Generator().manual_seed(0)
    shapes = method.shapes(plain.model.config)
    tensors = {n: torch.randn(s, generator=draw, dtype=torch.float64) / 8 for n, s in shapes.items()}
    adapter = Adapter("lora", "gpt", tensors, settings=method.describe(), path="lora")
    loaded = load_adapted(run, [save(adapter, tmp_path / "lora")], precision="64")
    (beside,) = build(
        type(plain.model),
        plain.model.config,
        Topology.single("cpu"),
        seed=1,
        precision="64",
        adapt=method.install,
    )
    beside.load_state_dict({n: w.read() for n, w in plain.weights().items()}, strict=False)
    method.fill([beside], tensors)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = beside.eval().logits(beside(tokens))
        assert (loaded.model.logits(loaded.model(tokens)) - expected).abs().max() < 1e-10
        assert (plain.model.logits(plain.model(tokens)) - expected).abs().max() > 1e-3
        (place,) = export(adapter, tmp_path / "peft", "peft", run)
        again = load_adapted(run, [place], precision="64").model
        assert (again.logits(again(tokens)) - expected).abs().max() < 1e-10
    with pytest.raises(CheckpointError, match="beside its base model only"):
        open_adapter(place)
    assert loaded.notices == plain.notices
    with pytest.raises(ConfigError, match="merged into the weights"):
        use(plain, [adapter])
    for others in ([], [tuned("gpt")[2]]):
        with pytest.raises(ConfigError, match="LoRA is in the weights since the model was loaded"):
            use(loaded, others)
    idle = {n: t if n.endswith("lora_a") else t * 0 for n, t in tensors.items()}
    (said,) = load_adapted(run, [Adapter(**{**vars(adapter), "tensors": idle})], precision="64").notices
    assert "lora changes no logit" in said
