"""Tokenizers embedded in GGUF files, rebuilt with the `tokenizers` library.

Two kinds: "gpt2" (byte-level BPE with merges) and "llama" (SentencePiece BPE with scores and byte fallback).
What each pre-tokenizer name means is llama.cpp's (github.com/ggml-org/llama.cpp, src/llama-vocab.cpp).
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from flm.worker.errors import CheckpointError
from flm.worker.gguf_file import GGUFFile
from flm.worker.tokenizer import Tokenizer
from flm.worker.vocabularies.library import LibraryVocabulary

_PREFIX = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # llama.cpp's token types
_SPACE = "\u2581"  # SentencePiece's space

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = _CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_DIGITS_1 = rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DIGITS_3 = _DIGITS_1.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_PATTERNS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "refact": (r"\p{N}", _GPT2),
    "command-r": (r"\p{N}", _GPT2),
    "llama-bpe": (_DIGITS_3,),
    "llama3": (_DIGITS_3,),
    "llama-v3": (_DIGITS_3,),
    "smaug-bpe": (_DIGITS_3,),
    "qwen2": (_DIGITS_1,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")  # a word that is a token is never merged from parts
_ADD_BOS = _WHOLE_WORDS


def read_tokenizer(file: GGUFFile) -> Tokenizer:
    """The tokenizer in the file's metadata. Raises CheckpointError."""
    inner = _build(file)
    ids = {name: file.get(f"{_PREFIX}{name}_token_id") for name in ("bos", "eos")}
    texts = {name: inner.id_to_token(i) if type(i) is int and i >= 0 else None for name, i in ids.items()}
    template = file.get("tokenizer.chat_template")
    return Tokenizer(
        LibraryVocabulary(inner),
        bos_token=texts["bos"],
        eos_token=texts["eos"],
        chat_template=template if isinstance(template, str) else None,
    )


def _build(file: GGUFFile) -> RustTokenizer:
    """Raises CheckpointError where it is missing, corrupt or of another kind."""
    kind, tokens = file.get(_PREFIX + "model"), file.get(_PREFIX + "tokens")
    if not isinstance(tokens, list) or not tokens:
        raise _fail(file, f"{_PREFIX}tokens is missing; a list of tokens expected")
    types = file.get(_PREFIX + "token_type") or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise _fail(file, f"{_PREFIX}token_type: {len(tokens)} entries expected, found {len(types)}")
    if kind not in ("gpt2", "llama"):
        raise _fail(file, f"{_PREFIX}model: 'gpt2' or 'llama' expected, found {kind!r}")
    try:
        tokenizer = _byte_level(file, tokens) if kind == "gpt2" else _sentencepiece(file, tokens, types)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise _fail(file, f"its tokenizer cannot be built: {error}") from error
    added = {_CONTROL: True, _USER_DEFINED: False}
    tokenizer.add_tokens(
        [
            AddedToken(token, special=added[t], normalized=False)
            for token, t in zip(tokens, types, strict=True)
            if t in added and token
        ]
    )
    _add_ends(file, tokenizer, tokens)
    return tokenizer


def _fail(file: GGUFFile, message: str) -> CheckpointError:
    return CheckpointError(str(file.path), message)


def _byte_level(file: GGUFFile, tokens: list[str]) -> RustTokenizer:
    pre = file.get(_PREFIX + "pre", "default")
    if pre not in _PATTERNS:
        raise _fail(file, f"{_PREFIX}pre: {pre!r} is not supported; supported: {', '.join(_PATTERNS)}")
    merges = [tuple(m.split(" ", 1)) for m in file.get(_PREFIX + "merges") or []]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = RustTokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _PATTERNS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GGUFFile, tokens: list[str], types: list[int]) -> RustTokenizer:
    scores = file.get(_PREFIX + "scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        found = len(scores) if isinstance(scores, list) else scores
        raise _fail(file, f"{_PREFIX}scores: {len(tokens)} entries expected, found {found}")
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = next((token for token, t in zip(tokens, types, strict=True) if t == _UNKNOWN), None)
    tokenizer = RustTokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(vocab, types, scores),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(file.get(_PREFIX + "add_space_prefix", True))
    spaces = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges(vocab: dict[str, int], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose join has the best score: as merges, every way to cut a token into
    two others, best joins first."""
    ranked = []
    for token, i in vocab.items():
        if types[i] != _NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[i], vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _add_ends(file: GGUFFile, tokenizer: RustTokenizer, tokens: list[str]) -> None:
    """What encode() puts around a text."""
    sentencepiece = file.get(_PREFIX + "model") == "llama"
    wants_bos = sentencepiece or file.get(_PREFIX + "pre") in _ADD_BOS
    ends: dict[str, str | None] = {"bos": None, "eos": None}
    for name, default in (("bos", wants_bos), ("eos", False)):
        i = file.get(f"{_PREFIX}{name}_token_id")
        if not file.get(f"{_PREFIX}add_{name}_token", default) or i is None:
            continue
        if type(i) is not int or not 0 <= i < len(tokens):
            raise _fail(file, f"{_PREFIX}{name}_token_id: an id below {len(tokens)} expected, found {i!r}")
        ends[name] = tokens[i]
    if any(ends.values()):
        parts = [ends["bos"], "$A", ends["eos"]]
        named = [(token, tokens.index(token)) for token in ends.values() if token]
        single = [part for part in parts if part]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)
