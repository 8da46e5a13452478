"""A smaller vocabulary: the tokens that texts use, what spells all else, and the rows of a model for these."""

import copy
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_rrd.models.initialization import embedding_of_tokens, plain_weights_of

BATCH = 1000  # texts that are tokenized at once
# Fields of configs and modules that hold ids of tokens, alone, in lists or in dicts.
_OF_TOKENS = re.compile(
    r"(^|_)token_(ids?|index)$|^padding_idx$|^(begin_)?suppress_tokens$|^bad_words_ids$|^(lang|task)_to_id$"
)
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_POSITIONS = re.compile("pos|wpe")  # in the names of tables that are not of tokens


def prune_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    min_count: int = 1,
    keep: Iterable[str] = (),
) -> tuple[Any, Any]:
    """A model and a tokenizer with the tokens that `texts` use, and those that spell any other text.

    These stay, in their order, under new ids:

    - special and added tokens, and those whose ids a config names;
    - tokens that `texts` use `min_count` times or more, and those in `keep`;
    - single characters and bytes, of WordPiece also as `##` forms, and tokens that these cannot spell;
    - of BPE the tokens on the way to a kept one. A merge stays where both parts and the result stay.

    A text whose tokens all stay gives the same tokens, and the model in eval mode bitwise the same hidden states; its
    logits are those of the kept tokens. Any other text is cut into more and shorter tokens. None of it becomes the
    unknown token that was not, if every character in the vocabulary is a token by itself, too.

    Prune a teacher before `student_from_teacher`, so that both read the same `input_ids`, or a student after training.

    ```python
    teacher, tokenizer = prune_vocabulary(teacher, tokenizer, dataset["text"])
    student = student_from_teacher(teacher, num_hidden_layers=2)
    ```

    Args:
        model: A transformers model with an embedding of tokens, (vocabulary, width), and any head or none.
        tokenizer: Its fast tokenizer: WordPiece, BPE or Unigram.
        texts: What will be read, such as a column of a data set. They are read once, in batches, not truncated.
        min_count: How many times `texts` must use a token, 1 or more.
        keep: More tokens, as the tokenizer names them (`tokenizer.tokenize(...)`).

    Returns:
        A model with an embedding of (kept tokens, width), and a tokenizer. Both are of the given ones' classes and
        share no memory with them; the given ones stay as they are.

    Raises:
        TypeError: `model` is not a transformers model.
        ValueError: `model` has adapters, is quantized or not in memory, or its vocabulary cannot be changed;
            `tokenizer` is slow, of another kind, or not the model's; `texts` are not strings; `min_count` is below 1;
            a token of `keep` is not in the vocabulary.
    """
    plain_weights_of(model, "model")
    backend, ids = _read_tokenizer(tokenizer)
    rows = _rows_of(model, ids)
    wanted = _checked_keep(keep, ids)
    if not isinstance(min_count, int) or isinstance(min_count, bool) or min_count < 1:
        raise ValueError(f"`min_count` must be an integer of 1 or more, got {min_count!r}. Try 1.")
    smaller, pruned = copy.deepcopy(model), copy.deepcopy(tokenizer)
    fields = _fields_of(smaller)
    named: set[int] = set()  # ids that a config or the backend names

    def note(number: int) -> int:
        named.add(number)
        return number

    _renumber_fields(fields, note)
    _renumber_backend(backend, note)
    if _counts_from_padding(model):
        named.update(range(model.config.pad_token_id))  # its id must stay: positions are counted from there
    counts = _counted(pruned, texts)
    wanted |= {token for token, number in ids.items() if counts[number] >= min_count or number in named}
    wanted |= ids.keys() & set(tokenizer.all_special_tokens)
    kept = _prune_backend(backend["model"], wanted)
    kept += sorted(wanted - set(kept), key=ids.__getitem__)  # added tokens that are beside the model's vocabulary
    unnamed = sorted(number for number in named - set(ids.values()) if 0 <= number < rows)  # rows without a token
    numbers = {before: after for after, before in enumerate([*(ids[token] for token in kept), *unnamed])}

    _renumber_backend(backend, lambda number: numbers.get(number, number))
    _renumber_tokenizer(pruned, backend, ids, {token: numbers[ids[token]] for token in kept})
    _keep_rows(smaller, numbers, rows)
    _renumber_fields(fields, lambda number: numbers.get(number, number), rows, len(numbers))
    smaller.config._name_or_path = ""  # the tokenizer there is another
    return smaller, pruned


# ---- What is given ----


def _read_tokenizer(tokenizer: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """What a fast tokenizer is as JSON, and its tokens with their ids."""
    if not getattr(tokenizer, "is_fast", False):
        came = f"got {type(tokenizer).__name__}"
        raise ValueError(f"`tokenizer` must be a fast one, {came}. Load it with AutoTokenizer.from_pretrained(...).")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = backend["model"]["type"]
    if kind not in ("WordPiece", "BPE", "Unigram"):
        came = f"got {kind}, which spells nothing"
        raise ValueError(f"`tokenizer` must be of the kind WordPiece, BPE or Unigram, {came}.")
    return backend, tokenizer.get_vocab()


def _rows_of(model: Any, ids: dict[str, int]) -> int:
    """The rows of a model's embedding of tokens."""
    table = embedding_of_tokens(model)
    if table is None:
        raise ValueError(f"`model` must have an embedding of tokens, got {type(model).__name__}, which has none.")
    rows, last = table.weight.shape[0], max(ids.values())
    if last >= rows:
        what = f"`tokenizer` has ids up to {last}, and `model` an embedding of {rows} rows"
        raise ValueError(f"{what}: they do not belong together. Load both from one folder.")
    return rows


def _checked_keep(keep: Any, ids: dict[str, int]) -> set[str]:
    tokens = [keep] if isinstance(keep, str) else list(keep)
    missing = [token for token in tokens if not isinstance(token, str) or token not in ids]
    if isinstance(keep, str) or missing:
        advice = 'Give a list of tokens as the tokenizer names them: tokenizer.tokenize("word").'
        what = f"must be a list of tokens, got {keep!r}" if isinstance(keep, str) else f"has no tokens: {missing[:5]}"
        raise ValueError(f"`keep` {what}. {advice}")
    return set(tokens)


def _counted(tokenizer: Any, texts: Any) -> Counter[int]:
    """How often the texts use each id."""
    if isinstance(texts, str | Mapping) or not isinstance(texts, Iterable):
        raise ValueError(f'`texts` must be many strings, got {type(texts).__name__}. Pass a list, or dataset["text"].')
    remaining, done = iter(texts), 0
    counts: Counter[int] = Counter()
    while batch := list(islice(remaining, BATCH)):
        for place, text in enumerate(batch, done):
            if not isinstance(text, str):
                came = f"got {type(text).__name__} at {place}"
                raise ValueError(f'`texts` must be strings, {came}. Pass one column, as dataset["text"].')
        done += len(batch)
        for row in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            counts.update(row)
    if not done:
        raise ValueError("`texts` must have at least one text, got none. A generator can be read only once.")
    return counts


# ---- The tokenizer ----


def _symbols_of(token: str, prefix: str, suffix: str) -> list[str]:
    """The tokens of one character each that a token is spelled with."""
    inside, end = len(token) > len(prefix) and token.startswith(prefix), ""
    if inside:
        token = token[len(prefix) :]
    if suffix and len(token) > len(suffix) and token.endswith(suffix):
        token, end = token[: -len(suffix)], suffix
    symbols = [(prefix if inside or place else "") + character for place, character in enumerate(token)]
    return [*symbols[:-1], symbols[-1] + end] if symbols else []


def _prune_backend(model: dict[str, Any], wanted: set[str]) -> list[str]:
    """Leave a tokenizer's model the wanted tokens, and what these and any text need; return all of them in order."""
    is_list = model["type"] == "Unigram"
    pieces = model["vocab"]
    vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)} if is_list else pieces
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    needed = wanted & vocabulary.keys()
    if is_list:
        unknown = None if model["unk_id"] is None else pieces[model["unk_id"]][0]
        needed.add(min(pieces, key=lambda piece: piece[1])[0])  # what an unknown character costs depends on its score
    else:
        unknown = model["unk_token"]
    needed |= vocabulary.keys() & {unknown}
    finds_whole = model["type"] != "BPE" or model.get("ignore_merges", False)  # tokens that no others are merged to
    for token in vocabulary:
        symbols = _symbols_of(token, prefix, suffix)
        is_spelled = all(symbol in vocabulary for symbol in symbols)
        is_byte = model.get("byte_fallback") and _BYTE.fullmatch(token)
        if symbols == [token] or (finds_whole and not is_spelled) or is_byte:
            needed.add(token)
    if model["type"] == "BPE":
        merges = [(first, second, first + second[len(prefix) :]) for first, second in model["merges"]]
        _add_parts(needed, merges, prefix, suffix)
        model["merges"] = [[first, second] for first, second, whole in merges if {first, second, whole} <= needed]
    kept = sorted(needed, key=vocabulary.__getitem__)
    model["vocab"] = (
        [pieces[vocabulary[token]] for token in kept] if is_list else {token: n for n, token in enumerate(kept)}
    )
    if is_list and unknown is not None:
        model["unk_id"] = kept.index(unknown)
    return kept


def _add_parts(needed: set[str], merges: list[tuple[str, str, str]], prefix: str, suffix: str) -> None:
    """Add the tokens that BPE makes on its way to the needed ones.

    In any text BPE makes a token as it makes it alone: of the merges that fit anywhere it takes the first of the list,
    again and again. Until the token is there, none reaches beyond it. So the tokens that it is made through alone are
    enough, and no merge of those that are gone would have come before.
    """
    ranks = {(first, second): rank for rank, (first, second, _) in enumerate(merges)}
    ways: dict[str, list[tuple[str, str]]] = {}
    for first, second, whole in merges:
        ways.setdefault(whole, []).append((first, second))
    waiting = list(needed)
    while waiting:
        token = waiting.pop()
        symbols, made = _symbols_of(token, prefix, suffix), []
        while len(symbols) > 1:
            pairs = list(zip(symbols, symbols[1:], strict=False))
            place = min(range(len(pairs)), key=lambda place: ranks.get(pairs[place], len(merges)))
            if pairs[place] not in ranks:
                break
            first, second = pairs[place]
            symbols[place : place + 2] = [first + second[len(prefix) :]]
            made += symbols[place : place + 1]
        # What cannot be made of its characters, such as one of bytes, keeps all ways to it.
        parts = made if symbols == [token] else [part for way in ways.get(token, ()) for part in way]
        waiting += [part for part in parts if part not in needed]
        needed.update(parts)


def _renumber_backend(node: Any, number: Callable[[int], int]) -> None:
    """Give new ids to the added tokens, the padding and the post-processor of a tokenizer's JSON."""
    if isinstance(node, list):
        if len(node) == 2 and isinstance(node[0], str) and type(node[1]) is int:  # a BERT's ["[SEP]", 102]
            node[1] = number(node[1])
        for each in node:
            _renumber_backend(each, number)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ("id", "pad_id") and type(value) is int:
                node[key] = number(value)
            elif key == "ids":
                node[key] = [number(each) for each in value]
            elif key not in ("model", "normalizer", "pre_tokenizer", "decoder", "truncation"):
                _renumber_backend(value, number)


def _renumber_tokenizer(
    tokenizer: Any, backend: dict[str, Any], before: dict[str, int], after: dict[str, int]
) -> None:
    """Put a pruned backend into a tokenizer, and new ids into what its class keeps beside it."""
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    tokenizer._tokenizer.encode_special_tokens = tokenizer.split_special_tokens
    if tokenizer.get_vocab() != after:
        name = type(tokenizer).__name__
        raise ValueError(f"`tokenizer` cannot be renumbered: {name} puts its added tokens elsewhere.")
    model = backend["model"]
    beside = {"_vocab": model["vocab"], "_vocab_scores": model["vocab"], "_merges": model.get("merges")}
    beside["vocab_file"] = None  # on disk, and whole
    tokenizer.init_kwargs.pop("added_tokens_decoder", None)
    for name, value in vars(tokenizer).items():
        if name in beside:
            vars(tokenizer)[name] = beside[name]
        elif isinstance(value, dict) and value and before.items() >= value.items():
            vars(tokenizer)[name] = {token: after[token] for token in value if token in after}  # an mBART's languages
    if getattr(tokenizer, "src_lang", None) is not None:
        tokenizer.src_lang = tokenizer.src_lang  # whose id an NLLB's post-processor has


# ---- The model ----


def _counts_from_padding(model: Any) -> bool:
    """Whether positions begin behind the padding's id, as a RoBERTa's do."""
    padding = getattr(model.config, "pad_token_id", None)
    found = [getattr(each, "padding_idx", None) for name, each in model.named_modules() if "position" in name]
    return padding is not None and padding in found


def _fields_of(model: Any) -> list[dict[str, Any]]:
    """The fields of a model's modules and configs, in these too, each once."""
    found: dict[int, dict[str, Any]] = {}
    waiting = [each for each in model.modules() if not isinstance(each, nn.Embedding)]
    while waiting:
        holder = waiting.pop()
        fields = holder if isinstance(holder, dict) else vars(holder)
        if id(fields) in found:
            continue
        found[id(fields)] = fields
        inside = (PreTrainedConfig, GenerationConfig) + (() if isinstance(holder, nn.Module) else (dict,))
        waiting += [value for value in fields.values() if isinstance(value, inside)]
    return list(found.values())


def _renumber_fields(
    fields: list[dict[str, Any]], number: Callable[[int], int], rows: int | None = None, new_rows: int | None = None
) -> None:
    """Give new ids to the tokens that configs and modules name, and the new size of the vocabulary."""

    def renumbered(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: renumbered(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(renumbered(each) for each in value)
        return number(value) if type(value) is int else value

    for each in fields:
        for name, value in each.items():
            if not isinstance(name, str):
                continue
            if _OF_TOKENS.search(name):
                each[name] = renumbered(value)
            elif name == "forced_decoder_ids" and value:
                each[name] = [[place, renumbered(token)] for place, token in value]
            elif name.endswith("vocab_size") and rows is not None and value == rows:
                each[name] = new_rows


def _keep_rows(model: Any, numbers: dict[int, int], rows: int) -> None:
    """Cut a model's tables of tokens to the rows of `numbers`, in their order: those that its class resizes."""
    order, shapes = torch.tensor(list(numbers)), _resized_shapes(model, len(numbers))
    done: set[int] = set()
    for key, weight in model.state_dict(keep_vars=True).items():
        sizes = zip(weight.shape, shapes[key], strict=True) if isinstance(weight, Tensor) else ()
        for dimension in [place for place, (before, after) in enumerate(sizes) if before != after]:
            if id(weight) not in done:  # tied weights stay one parameter
                weight.data = weight.data.index_select(dimension, order.to(weight.device))
                weight.grad = None
                done.add(id(weight))
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.out_features = module.weight.shape[0]
        if not isinstance(module, nn.Embedding):
            continue
        if id(module.weight) in done:
            module.num_embeddings = len(numbers)
            module.padding_idx = None if module.padding_idx is None else numbers.get(module.padding_idx)
        elif len(numbers) < rows == module.num_embeddings and not _POSITIONS.search(key):
            came = f"got {type(model).__name__} with {key}"
            raise ValueError(f"`model` has a table of tokens that its class does not resize, {came}.")
    model.config.get_text_config().vocab_size = len(numbers)


def _resized_shapes(model: Any, count: int) -> dict[str, torch.Size]:
    """The shapes of a model's tensors when its class has resized the vocabulary, found on a copy without memory."""
    tensors = {id(each): each.detach().to("meta") for each in (*model.parameters(), *model.buffers())}
    tensors |= {id(each): nn.Parameter(tensors[id(each)], each.requires_grad) for each in model.parameters()}
    try:
        outline = copy.deepcopy(model, dict(tensors))
        outline.resize_token_embeddings(count)
    except NotImplementedError as error:
        name = type(model).__name__
        raise ValueError(f"`model` cannot change its vocabulary, got {name}: {error}") from error
    return {key: each.shape for key, each in outline.state_dict().items() if isinstance(each, Tensor)}
