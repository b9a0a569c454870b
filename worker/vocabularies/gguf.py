"""Tokenizers embedded in GGUF files.

Two kinds: "gpt2" (byte-level BPE with merges), built with the `tokenizers` library, and "llama" (SentencePiece BPE
with scores and byte fallback), for which the SentencePiece model is put together again.
"""

from __future__ import annotations

import re

from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as RustTokenizer

from flm.worker.errors import CheckpointError
from flm.worker.files.gguf_file import GGUFFile
from flm.worker.vocabularies import patterns
from flm.worker.vocabularies.base import Vocabulary
from flm.worker.vocabularies.library import LibraryVocabulary, byte_level_splits
from flm.worker.vocabularies.tokenizer import Tokenizer

_PREFIX = "tokenizer.ggml."
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # llama.cpp's token types, which are SentencePiece's
# Tokens that some files call user-defined though they begin or end a turn, or a hole to fill
_MARKS = re.compile(r"<\|\w+\|>|<｜[^<>]+｜>|<(start|end)_of_turn>")


def read_tokenizer(file: GGUFFile) -> Tokenizer:
    """The tokenizer in the file's metadata. Raises CheckpointError where it is missing, corrupt or of another kind."""
    kind, tokens = file.get(_PREFIX + "model"), file.get(_PREFIX + "tokens")
    if not isinstance(tokens, list) or not tokens:
        raise _fail(file, f"{_PREFIX}tokens is missing; a list of tokens expected")
    types = file.get(_PREFIX + "token_type") or [_NORMAL] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens):
        found = len(types) if isinstance(types, list) else repr(types)
        raise _fail(file, f"{_PREFIX}token_type: {len(tokens)} entries expected, found {found}")
    if kind not in ("gpt2", "llama"):
        raise _fail(file, f"{_PREFIX}model: 'gpt2' or 'llama' expected, found {kind!r}")
    try:
        vocabulary = _byte_level(file, tokens, types) if kind == "gpt2" else _pieces(file, tokens, types)
    except CheckpointError:
        raise
    except Exception as error:  # the libraries raise bare Exception
        raise _fail(file, f"its tokenizer cannot be built: {error}") from error
    named = {name: file.get(f"{_PREFIX}{name}_token_id") for name in ("bos", "eos")}
    texts = {name: tokens[i] for name, i in named.items() if type(i) is int and 0 <= i < len(tokens)}
    template = file.get("tokenizer.chat_template")
    return Tokenizer(
        vocabulary,
        bos_token=texts.get("bos"),
        eos_token=texts.get("eos"),
        chat_template=template if isinstance(template, str) else None,
    )


def _fail(file: GGUFFile, message: str) -> CheckpointError:
    return CheckpointError(str(file.path), message)


def _byte_level(file: GGUFFile, tokens: list[str], types: list[int]) -> Vocabulary:
    pre = file.get(_PREFIX + "pre", "default")
    if pre not in patterns.BY_NAME:
        supported = ", ".join(patterns.BY_NAME)
        raise _fail(file, f"{_PREFIX}pre: {pre!r} is not supported; supported: {supported}")
    merges = [tuple(m.split(" ", 1)) for m in file.get(_PREFIX + "merges") or []]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = RustTokenizer(
        models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in patterns.WHOLE_WORDS)
    )
    if pre in patterns.NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = byte_level_splits(patterns.BY_NAME[pre])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=t == _CONTROL or bool(_MARKS.fullmatch(token)), normalized=False)
            for token, t in zip(tokens, types, strict=True)
            if t in (_CONTROL, _USER_DEFINED) and token
        ]
    )
    bos, eos = _ends(file, tokens, pre in patterns.ADD_BOS)
    if bos or eos:
        single = [*(tokens[i] for i in bos), "$A", *(tokens[i] for i in eos)]
        named = [(tokens[i], i) for i in {*bos, *eos}]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)
    texts = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    return LibraryVocabulary(tokenizer, texts)


def _pieces(file: GGUFFile, tokens: list[str], types: list[int]) -> Vocabulary:
    from flm.worker.vocabularies import sentencepiece_model

    scores = file.get(_PREFIX + "scores")
    if scores is None:  # XVERSE: its vocabulary is in the order in which pairs were joined
        scores = [-float(i) for i in range(len(tokens))]
    if not isinstance(scores, list) or len(scores) != len(tokens):
        found = len(scores) if isinstance(scores, list) else scores
        raise _fail(file, f"{_PREFIX}scores: {len(tokens)} entries expected, found {found}")
    space = bool(file.get(_PREFIX + "add_space_prefix", True))
    unknown = _id(file, "unknown", len(tokens))
    model = sentencepiece_model.rebuild(tokens, scores, types, space, unknown)
    bos, eos = _ends(file, tokens, True)
    own, inside = sentencepiece_model.own_tokens(model), sentencepiece_model.role_marks(model)
    return sentencepiece_model.SentencePieceVocabulary(model, own, bos, eos, inside=inside)


def _ends(file: GGUFFile, tokens: list[str], wants_bos: bool) -> tuple[list[int], list[int]]:
    """What encode() puts around a text."""
    ends: dict[str, list[int]] = {"bos": [], "eos": []}
    for name, default in (("bos", wants_bos), ("eos", False)):
        i = _id(file, name, len(tokens)) if file.get(f"{_PREFIX}add_{name}_token", default) else None
        ends[name] = [] if i is None else [i]
    return ends["bos"], ends["eos"]


def _id(file: GGUFFile, name: str, size: int) -> int | None:
    i = file.get(f"{_PREFIX}{name}_token_id")
    if i is not None and (type(i) is not int or not 0 <= i < size):
        raise _fail(file, f"{_PREFIX}{name}_token_id: an id below {size} expected, found {i!r}")
    return i
