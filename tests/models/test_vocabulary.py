"""A pruned vocabulary: which tokens stay, how texts are read with it, and the model's rows and ids."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2Model,
    XLMRobertaTokenizer,
)

from hf_rrd import prune_vocabulary, student_from_teacher
from tests.builders import tiny_bert

LETTERS = "abcdeé ☃A."
KINDS = ["WordPiece", "byte-level BPE", "BPE with ends", "BPE with fallback", "BPE with prefix", "Unigram"]


def corpus(seed: int = 0, count: int = 300) -> list[str]:
    """Texts of few letters, so that many merges compete."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcde", k=rng.randint(1, 6))) for _ in range(60)]
    return [" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(count)]


def trained(kind: str, size: int = 120, texts: list[str] | None = None) -> Any:
    """A tokenizer with special tokens first, and one more token that was added."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    common = {"vocab_size": size + 256 * (kind == "byte-level BPE"), "special_tokens": special, "show_progress": False}
    if kind == "WordPiece":
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        backend.decoder, trainer = decoders.WordPiece(), trainers.WordPieceTrainer(**common)
    elif kind == "byte-level BPE":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(**common, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    elif kind == "Unigram":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(**common, unk_token="<unk>", initial_alphabet=["é"])
    else:
        ends = {"end_of_word_suffix": "</w>"} if kind == "BPE with ends" else {}
        ends |= {"continuing_subword_prefix": "##"} if kind == "BPE with prefix" else {}
        backend = Tokenizer(models.BPE(unk_token="<unk>", **ends))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.BpeTrainer(**common, **ends)
    backend.train_from_iterator(corpus() if texts is None else texts, trainer)
    if kind == "BPE with fallback":
        state = json.loads(backend.to_str())
        state["model"]["byte_fallback"] = True
        for byte in range(256):
            state["model"]["vocab"][f"<0x{byte:02X}>"] = len(state["model"]["vocab"])
        backend = Tokenizer.from_str(json.dumps(state))
    ids = [(token, backend.token_to_id(token)) for token in ("</s>", "<s>")]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "unk", "mask")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **names)
    tokenizer.add_tokens(["<new>"])
    return tokenizer


def bert_for(tokenizer: Any, build: Any = BertModel, more: int = 0, **fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {
        "vocab_size": len(tokenizer) + more,
        "max_position_embeddings": 40,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return build(BertConfig(**sizes | fields)).eval()


TOKENIZERS = {kind: trained(kind) for kind in KINDS}
HALF = corpus()[:4]  # texts that use a part of the tokens
PRUNED = {kind: prune_vocabulary(bert_for(each), each, HALF)[1] for kind, each in TOKENIZERS.items()}


def tokens(tokenizer: Any, text: str) -> list[str]:
    backend = tokenizer.backend_tokenizer
    return [backend.id_to_token(number) for number in backend.encode(text).ids]


# ---- The tokenizer ----


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_is_smaller_and_its_ids_are_in_the_old_order_without_holes(kind: str) -> None:
    before, after = TOKENIZERS[kind].get_vocab(), PRUNED[kind].get_vocab()
    assert len(after) < len(before) and after.keys() < before.keys()
    assert sorted(after.values()) == list(range(len(after)))
    assert sorted(after, key=after.__getitem__) == sorted(after, key=before.__getitem__)
    assert {"<s>", "<pad>", "</s>", "<unk>", "<mask>", "<new>"} <= after.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_themselves_give_the_same_tokens(kind: str) -> None:
    for text in [*HALF, "", "<new>", f"{HALF[0]}<mask>"]:
        assert tokens(PRUNED[kind], text) == tokens(TOKENIZERS[kind], text)


PIECES = st.one_of(st.text(LETTERS, max_size=12), st.sampled_from(" ".join(HALF).split()))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(PIECES, max_size=5), glue=st.sampled_from([" ", ""]))
def test_any_text_whose_tokens_stay_gives_them_and_none_becomes_unknown(
    kind: str, pieces: list[str], glue: str
) -> None:
    text = glue.join(pieces)
    before, after = tokens(TOKENIZERS[kind], text), tokens(PRUNED[kind], text)
    if PRUNED[kind].get_vocab().keys() >= set(before):
        assert after == before
    assert after.count("<unk>") <= before.count("<unk>")
    if TOKENIZERS[kind].decoder is not None and "<unk>" not in before:
        assert TOKENIZERS[kind].decoder.decode(before) == PRUNED[kind].decoder.decode(after)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "BPE" in kind])
def test_random_choices_of_kept_tokens_leave_the_merges_of_bpe_as_they_were(kind: str) -> None:
    tokenizer, rng, texts = TOKENIZERS[kind], random.Random(1), corpus(seed=1, count=400)
    read, agreed = [tokens(tokenizer, text) for text in texts], 0
    everything = sorted(tokenizer.get_vocab())
    for _ in range(8):
        keep = rng.sample(everything, len(everything) // 2)
        _, pruned = prune_vocabulary(bert_for(tokenizer), tokenizer, ["a"], keep=keep)
        kept = pruned.get_vocab().keys()
        for text, before in zip(texts, read, strict=True):
            if kept >= set(before):
                agreed += 1
                assert tokens(pruned, text) == before
    assert agreed > 100


def test_bpe_keeps_the_tokens_on_the_way_to_a_kept_one_and_no_others() -> None:
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("c", "d"), ("a", "bc"), ("abc", "d")]
    vocabulary = ["<pad>", "<unk>", *"abcd", "ab", "bc", "abc", "cd", "abcd"]
    model = models.BPE({token: number for number, token in enumerate(vocabulary)}, merges, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), pad_token="<pad>", unk_token="<unk>")
    _, pruned = prune_vocabulary(bert_for(tokenizer), tokenizer, ["abcd"])
    assert list(pruned.get_vocab()) and set(vocabulary) - pruned.get_vocab().keys() == {"bc", "cd"}
    backend = json.loads(pruned.backend_tokenizer.to_str())["model"]
    assert backend["merges"] == [["a", "b"], ["ab", "c"], ["abc", "d"]]
    assert tokens(pruned, "abcdcd") == ["abcd", "c", "d"]


def test_a_whole_word_that_its_merges_do_not_reach_stays_one_token() -> None:
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<unk>", *"abc", "ab", "abc", "xyz", "ac"])}
    model = models.BPE(vocabulary, [("a", "b")], unk_token="<unk>", ignore_merges=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), pad_token="<pad>", unk_token="<unk>")
    _, pruned = prune_vocabulary(bert_for(tokenizer), tokenizer, ["abc"])
    assert tokens(pruned, "abc") == ["abc"] and tokens(pruned, "abab") == ["a", "b", "a", "b"]
    assert tokens(pruned, "xyz") == ["xyz"], "no character of it is a token"
    assert tokens(pruned, "ac") == ["a", "c"]


def test_a_wordpiece_with_a_character_that_is_no_token_stays() -> None:
    names = ["[PAD]", "[UNK]", "a", "##a", "aa", "ab", "b", "##ca", "aaa"]
    vocabulary = {token: number for number, token in enumerate(names)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    _, pruned = prune_vocabulary(bert_for(tokenizer), tokenizer, ["aa"])
    assert set(names) - pruned.get_vocab().keys() == {"aaa"}
    assert tokens(pruned, "aaa") == ["aa", "##a"] and tokens(pruned, "abca") == ["ab", "##ca"]


def test_min_count_counts_tokens_over_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_rrd.models.vocabulary.BATCH", 2)
    tokenizer = TOKENIZERS["WordPiece"]
    long = [token for token in tokenizer.get_vocab() if len(token) == 3 and token.isalpha()][:2]
    texts = (text for text in [long[0], "a", long[1], "b", long[0]])
    _, pruned = prune_vocabulary(bert_for(tokenizer), tokenizer, texts, min_count=2)
    assert long[0] in pruned.get_vocab() and long[1] not in pruned.get_vocab()
    _, pruned = prune_vocabulary(bert_for(tokenizer), tokenizer, ["a"], keep=[long[1]])
    assert tokens(pruned, f"{long[1]} {long[0]}")[1:3] == [long[1], long[0][:1]] or long[0] not in pruned.get_vocab()


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_is_loaded_as_it_was(kind: str, tmp_path: Path) -> None:
    PRUNED[kind].save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*corpus(seed=2, count=20), "☃ <new>é<mask>"]:
        assert loaded(text)["input_ids"] == PRUNED[kind](text)["input_ids"]
    assert loaded.get_vocab() == PRUNED[kind].get_vocab()
    assert [loaded.pad_token_id, loaded.mask_token_id] == [1, 4]


def test_a_bert_tokenizer_stays_one_with_its_settings(tmp_path: Path) -> None:
    names = [
        "[unused0]",
        "[PAD]",
        "[unused1]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"AabB[]",
        "##b",
        "Ab",
        "ab",
        "Aa",
    ]
    names += [f"##{character}" for character in "unsed01]"] + list("und0")
    tokenizer = BertTokenizer({token: number for number, token in enumerate(names)}, do_lower_case=False)
    tokenizer.padding_side, tokenizer.model_max_length = "left", 7
    model, pruned = prune_vocabulary(bert_for(tokenizer), tokenizer, ["Ab"])
    pruned.save_pretrained(tmp_path)
    for each in (pruned, BertTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert type(each) is BertTokenizer and each.model_max_length == 7
        assert "Ab" in each.get_vocab() and "[unused1]" not in each.get_vocab()
        assert tokens(each, "Ab ab") == ["[CLS]", "Ab", "a", "##b", "[SEP]"]
        assert tokens(each, "Ab") == [each.convert_ids_to_tokens(number) for number in each("Ab")["input_ids"]]
    assert pruned.padding_side == "left" and pruned.pad_token_id == model.config.pad_token_id == 0
    assert pruned(["Ab", "Ab ab"], padding=True)["input_ids"][0][:2] == [0, 0]


def test_an_xlm_roberta_tokenizer_stays_one(tmp_path: Path) -> None:
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁ab", -3.0), ("a", -4.0)]
    pieces += [("b", -4.5), ("bb", -3.5), ("▁abb", -3.2), ("c", -9.0), ("<mask>", 0.0)]
    tokenizer = XLMRobertaTokenizer(vocab=pieces)
    _, pruned = prune_vocabulary(bert_for(tokenizer), tokenizer, ["ab c"])
    pruned.save_pretrained(tmp_path)
    for each in (pruned, XLMRobertaTokenizer.from_pretrained(tmp_path)):
        assert type(each) is XLMRobertaTokenizer
        assert tokens(each, "ab abb c☃") == ["<s>", "▁ab", "▁ab", "b", "▁", "c", "<unk>", "</s>"]
    assert pruned.get_vocab().keys() == tokenizer.get_vocab().keys() - {"▁abb", "bb"}


def test_a_tokenizer_without_special_tokens_and_one_with_ids_of_its_own_have_the_new_ids() -> None:
    model = models.BPE({"a": 0, "b": 1, "aa": 2, "ab": 3, "fr": 4}, [("a", "a"), ("a", "b")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    tokenizer.lang_code_to_id = {"fr": 4}
    _, pruned = prune_vocabulary(bert_for(tokenizer, pad_token_id=None), tokenizer, ["ab"], keep=["fr"])
    assert pruned.get_vocab() == {"a": 0, "b": 1, "ab": 2, "fr": 3}
    assert pruned.lang_code_to_id == {"fr": 3} and tokenizer.lang_code_to_id == {"fr": 4}


def test_the_cost_of_an_unknown_character_stays_that_of_the_rarest_piece() -> None:
    pieces = [("<pad>", 0.0), ("<unk>", 0.0), ("a", -1.0), ("b", -1.0), ("ab", -30.0), ("bab", -1.5), ("cab", -40.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=1))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    _, pruned = prune_vocabulary(bert_for(tokenizer), tokenizer, ["ab"])
    assert tokens(tokenizer, "cab") == tokens(pruned, "cab") == ["cab"]
    assert "bab" not in pruned.get_vocab() and tokens(pruned, "bab") == ["b", "a", "b"]


# ---- The model ----


def inputs_of(tokenizer: Any, texts: list[str]) -> Any:
    return tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)


def rows_of(tokenizer: Any, pruned: Any) -> list[int]:
    """The old ids of the tokens that stay, in the order of the new ones."""
    before, after = tokenizer.get_vocab(), pruned.get_vocab()
    return [before[token] for token in sorted(after, key=after.__getitem__)]


def gpt2_for(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=40, **ids)
    )


def t5_for(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    ids = {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": len(tokenizer) - 1}
    return T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer) + 9, **sizes, **ids))


def bart_for(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 40}
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "forced_eos_token_id": 2}
    model = BartForConditionalGeneration(BartConfig(vocab_size=len(tokenizer), **sizes, **ids))
    model.final_logits_bias = torch.randn_like(model.final_logits_bias)
    return model


def llama_for(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, pad_token_id=1, tie_word_embeddings=False))


def roberta_for(tokenizer: Any, padding: int = 1) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"max_position_embeddings": 160}
    return RobertaForMaskedLM(RobertaConfig(vocab_size=len(tokenizer), **sizes, pad_token_id=padding))


MODELS = {
    "BERT, masked": ("WordPiece", lambda tokenizer: bert_for(tokenizer, BertForMaskedLM)),
    "BERT, untied": ("WordPiece", lambda tokenizer: bert_for(tokenizer, BertForMaskedLM, tie_word_embeddings=False)),
    "RoBERTa, masked": ("byte-level BPE", roberta_for),
    "GPT-2": ("byte-level BPE", gpt2_for),
    "Llama, untied": ("BPE with fallback", llama_for),
    "T5": ("Unigram", t5_for),
    "BART": ("byte-level BPE", bart_for),
}


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_bitwise_equal_and_logits_those_of_the_kept_tokens(name: str, tmp_path: Path) -> None:
    kind, build = MODELS[name]
    tokenizer, model = TOKENIZERS[kind], build(TOKENIZERS[kind]).eval()
    with torch.no_grad():  # a bias of the head that tells rows apart
        for key, weight in model.named_parameters():
            if key.endswith("predictions.bias") or key == "lm_head.bias":
                weight.normal_()
    given = {key: weight.clone() for key, weight in model.state_dict().items()}
    settings_before, state = model.config.to_dict(), tokenizer.backend_tokenizer.to_str()
    smaller, pruned = prune_vocabulary(model, tokenizer, HALF)
    assert model.config.to_dict() == settings_before and tokenizer.backend_tokenizer.to_str() == state
    smaller.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]] == []
    rows = torch.tensor(rows_of(tokenizer, pruned))
    before, after = inputs_of(tokenizer, HALF), inputs_of(pruned, HALF)
    if model.config.is_encoder_decoder:
        before["decoder_input_ids"], after["decoder_input_ids"] = before["input_ids"], after["input_ids"]
    with torch.no_grad():
        expected = model(**before, output_hidden_states=True)
        for each in (smaller, loaded.eval()):
            outputs = each(**after, output_hidden_states=True)
            states = "decoder_hidden_states" if model.config.is_encoder_decoder else "hidden_states"
            assert all(torch.equal(*pair) for pair in zip(outputs[states], expected[states], strict=True))
            torch.testing.assert_close(outputs.logits, expected.logits[..., rows], rtol=0, atol=1e-6)
            assert each.get_input_embeddings().num_embeddings == len(pruned) == each.config.vocab_size
    assert type(smaller) is type(model) and not smaller.training
    tied = model.config.tie_word_embeddings
    assert (smaller.get_output_embeddings().weight is smaller.get_input_embeddings().weight) == tied
    assert all(torch.equal(weight, given[key]) for key, weight in model.state_dict().items())
    memory = {weight.data_ptr() for weight in model.parameters()}
    assert not memory & {weight.data_ptr() for weight in smaller.parameters()}


def test_ids_in_configs_generation_config_and_modules_are_the_new_ones() -> None:
    tokenizer = TOKENIZERS["Unigram"]
    model, last = t5_for(tokenizer), len(tokenizer) - 1
    model.generation_config.forced_decoder_ids = [[1, last], [2, None]]
    model.generation_config.suppress_tokens, model.generation_config.eos_token_id = [2, last], [2, last]
    model.generation_config.bad_words_ids = [[last, 2]]
    model.config.task_specific_params = {"a": {"forced_bos_token_id": last, "length": last}}
    model.config.unrelated, model.config.sep_token_id = last, 10**6
    model.config.mask_token_id = len(tokenizer) + 3  # a row that is no token's
    smaller, pruned = prune_vocabulary(model, tokenizer, HALF)
    new, settings_, generation = len(pruned) - 1, smaller.config, smaller.generation_config
    assert pruned.convert_ids_to_tokens(new) == "<new>"
    assert [settings_.decoder_start_token_id, settings_.pad_token_id, settings_.eos_token_id] == [new, 1, 2]
    assert generation.decoder_start_token_id == new and generation.forced_decoder_ids == [[1, new], [2, None]]
    assert generation.suppress_tokens == generation.eos_token_id == [2, new] and generation.bad_words_ids == [[new, 2]]
    assert settings_.task_specific_params == {"a": {"forced_bos_token_id": new, "length": last}}
    assert settings_.unrelated == last and settings_.sep_token_id == 10**6
    assert settings_.vocab_size == smaller.encoder.config.vocab_size == smaller.decoder.config.vocab_size == new + 2
    assert smaller.encoder.config.decoder_start_token_id == new
    assert settings_.mask_token_id == new + 1
    tables = [each.get_input_embeddings().weight for each in (model, smaller)]
    assert torch.equal(tables[1][new + 1], tables[0][len(tokenizer) + 3])
    assert settings_._name_or_path == ""


def test_the_padding_of_embeddings_and_modules_moves_with_its_token() -> None:
    tokenizer = TOKENIZERS["WordPiece"]
    old = tokenizer.get_vocab()["<new>"]
    model = bert_for(tokenizer, pad_token_id=old)
    smaller, pruned = prune_vocabulary(model, tokenizer, HALF)
    new = pruned.get_vocab()["<new>"]
    assert new != old and smaller.embeddings.word_embeddings.padding_idx == smaller.config.pad_token_id == new
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=40,
            eos_token_id=old,
        )
    ).eval()
    smaller, pruned = prune_vocabulary(clip, tokenizer, HALF)
    texts = [f"{text}<new>" for text in HALF]
    pooled = [each(**inputs_of(reads, texts)).pooler_output for each, reads in ((clip, tokenizer), (smaller, pruned))]
    assert torch.equal(*pooled)


def test_positions_that_are_counted_from_the_padding_stay() -> None:
    tokenizer = copy.deepcopy(TOKENIZERS["byte-level BPE"])
    number = 100  # the first of its tokens that is no byte and no special token is beyond it
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(number)
    model = roberta_for(tokenizer, number).eval()
    smaller, pruned = prune_vocabulary(model, tokenizer, HALF)
    assert pruned.pad_token_id == smaller.config.pad_token_id == number
    with torch.no_grad():
        states = [
            each.roberta(**inputs_of(reads, HALF)).last_hidden_state
            for each, reads in ((model, tokenizer), (smaller, pruned))
        ]
    assert torch.equal(*states)


def test_a_vocabulary_that_is_used_whole_stays_whole() -> None:
    tokenizer = TOKENIZERS["WordPiece"]
    model = bert_for(tokenizer)
    smaller, pruned = prune_vocabulary(model, tokenizer, HALF, keep=tokenizer.get_vocab())
    assert pruned.get_vocab() == tokenizer.get_vocab()
    assert all(torch.equal(*pair) for pair in zip(smaller.parameters(), model.parameters(), strict=True))


def test_a_teacher_may_be_pruned_before_its_student_and_a_student_after() -> None:
    tokenizer = TOKENIZERS["WordPiece"]
    teacher = bert_for(tokenizer, BertForMaskedLM, num_hidden_layers=3)
    first, pruned = prune_vocabulary(teacher, tokenizer, HALF)
    one = student_from_teacher(first, num_hidden_layers=2)
    other, _ = prune_vocabulary(student_from_teacher(teacher, num_hidden_layers=2), tokenizer, HALF)
    read = inputs_of(pruned, HALF)
    assert one.initialization.fresh == [] and torch.equal(one(**read).logits, other(**read).logits)
    kept = [weight.requires_grad for weight in other.parameters()]
    assert all(kept)


# ---- What is refused ----


class Slow:
    is_fast = False


def test_what_cannot_be_pruned_is_an_error_that_says_what_to_do() -> None:
    tokenizer = TOKENIZERS["WordPiece"]
    model = bert_for(tokenizer)

    def message(**changes: Any) -> str:
        arguments = {"model": model, "tokenizer": tokenizer, "texts": HALF} | changes
        with pytest.raises((ValueError, TypeError)) as error:
            prune_vocabulary(**arguments)
        return str(error.value)

    assert message(tokenizer=Slow()) == (
        "`tokenizer` must be a fast one, got Slow. Load it with AutoTokenizer.from_pretrained(...)."
    )
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    kind = message(tokenizer=PreTrainedTokenizerFast(tokenizer_object=words))
    assert kind == "`tokenizer` must be of the kind WordPiece, BPE or Unigram, got WordLevel, which spells nothing."
    last = len(tokenizer) - 1
    assert message(model=tiny_bert()) == (
        f"`tokenizer` has ids up to {last}, and `model` an embedding of 50 rows: they do not belong together. "
        "Load both from one folder."
    )
    assert message(min_count=0) == "`min_count` must be an integer of 1 or more, got 0. Try 1."
    assert message(min_count=True).startswith("`min_count` must be an integer")
    assert message(keep=["a", "zebra"]).startswith("`keep` has no tokens: ['zebra']. Give a list of tokens")
    assert message(keep="ab").startswith("`keep` must be a list of tokens, got 'ab'.")
    assert message(texts="a text") == '`texts` must be many strings, got str. Pass a list, or dataset["text"].'
    assert message(texts={"text": ["a"]}).startswith("`texts` must be many strings, got dict.")
    assert message(texts=["a", {"text": "b"}]) == (
        '`texts` must be strings, got dict at 1. Pass one column, as dataset["text"].'
    )
    assert message(texts=[]).startswith("`texts` must have at least one text, got none.")
    assert message(model=torch.nn.Linear(1, 1)) == (
        "`model` must be a PreTrainedModel, got Linear. Load one: AutoModel.from_pretrained(...)."
    )
    speech = Wav2Vec2Model(
        Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    assert message(model=speech).startswith("`model` must have an embedding of tokens, got Wav2Vec2Model")


def test_adapters_and_quantized_weights_are_refused() -> None:
    peft = pytest.importorskip("peft")
    tokenizer = TOKENIZERS["WordPiece"]
    adapted = peft.get_peft_model(bert_for(tokenizer), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="`model` has adapters, got PeftModel. Merge them: `model.merge_and_unload"):
        prune_vocabulary(adapted, tokenizer, HALF)
    quantized = bert_for(tokenizer)
    quantized.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="`model` has quantized weights, got BertModel"):
        prune_vocabulary(quantized, tokenizer, HALF)
