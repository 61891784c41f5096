"""From a folder of transformers and a prompt to the text: the same ids as its tokenizer's, the same answer as `generate`'s."""

import logging

import pytest
import torch

import tokenizers
from megalith.generate.asking import ask
from megalith.generate.loading import load_model
from megalith.generate.sampling import Sampling
from megalith.generate.text import complete, search_texts
from tests.reference.test_encoder_decoder import randomised, rms

transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *(f"<extra_id_{i}>" for i in range(4))]
TEXT = "the cat sat on a mat dog and ran home red hat big"
PROMPTS = {
    "t5": ["the <extra_id_0> sat on the <extra_id_1>", "a dog ran home", "big red <extra_id_0>"],
    "bart": ["the <mask> sat on the mat", "a dog ran home", "<mask>"],
    "llama": ["the cat sat", "a dog ran home and", "big"],
}
TEMPLATES = {"t5": "$A </s>", "bart": "<s> $A </s>", "llama": "<s> $A"}


def make_tokenizer(family):
    words = {word: id for id, word in enumerate([*SPECIAL, *TEXT.split()])}
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    engine.add_special_tokens(SPECIAL)
    engine.post_processor = tokenizers.processors.TemplateProcessing(
        single=TEMPLATES[family], special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    roles = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=engine, mask_token="<mask>", **roles)


def make_model(family, size):
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    if family == "t5":
        theirs = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=size, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=1,
                relative_attention_num_buckets=8, relative_attention_max_distance=6, **ids,
            )
        )  # fmt: skip
        for module in theirs.modules():
            if type(module).__name__ == "T5LayerNorm":
                module.forward = rms(module)
        return theirs
    if family == "bart":
        return transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                vocab_size=size, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=24, **ids,
            )
        )  # fmt: skip
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=size, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, **ids,
        )
    )  # fmt: skip


@pytest.fixture(scope="module", params=PROMPTS)
def folder(request, tmp_path_factory):
    """(family, their model, their tokenizer, the folder that they saved)."""
    where, family = tmp_path_factory.mktemp(request.param), request.param
    spelling = make_tokenizer(family)
    theirs = randomised(make_model(family, len(spelling)))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(2)
    if family == "bart":
        theirs.generation_config.forced_bos_token_id = 0
    theirs.save_pretrained(where)
    spelling.save_pretrained(where)
    return family, theirs, transformers.AutoTokenizer.from_pretrained(where), where


def test_ids_and_answers(folder):
    family, theirs, spelling, where = folder
    loaded = load_model(where)
    assert loaded.model.config.max_positions == (24 if family == "bart" else None)
    searching = Sampling(tokens_to_generate=6, beams=3, num_samples=2)
    found = complete(loaded, PROMPTS[family], Sampling(tokens_to_generate=6))
    best = search_texts(loaded, PROMPTS[family], searching)
    for prompt, greedy, beams in zip(PROMPTS[family], found, best, strict=True):
        given = spelling(prompt, return_tensors="pt")
        asked = ask(loaded, prompt)
        assert (asked.source or asked.tokens) == given["input_ids"][0].tolist()
        given.pop("token_type_ids", None)
        begin = len(asked.tokens)
        for rows, options in (([greedy], {}), (beams, {"num_beams": 3, "num_return_sequences": 2})):
            out = theirs.generate(**given, max_new_tokens=6, do_sample=False, **options)
            for row, tokens in zip(rows, out.tolist(), strict=True):
                made = tokens[begin:]
                made = made[: made.index(2) + 1] if 2 in made else made
                assert row.tokens == made
                text = made[:-1] if made[-1] == 2 else made
                words = spelling.decode(text[1:] if family == "bart" else text)
                assert (row.text if row.decoded is None else row.decoded).split() == words.split()
    assert len({row.text for row in found}) > 1


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_a_prompt_without_the_beginning(folder):
    _, _, spelling, where = folder
    loaded = load_model(where)
    plain = spelling("the cat", add_special_tokens=False)["input_ids"]
    for bos, expected in ((None, [0, *plain]), (True, [0, *plain]), (False, plain)):
        bare = type(loaded)(loaded.model, loaded.tokenizer, loaded.folder, loaded.state, bos=bos)
        assert ask(bare, "the cat").tokens == expected
    assert ask(loaded, "").tokens == [0]
