"""Small vocabularies of every kind that keeps them in a directory, trained here on a few sentences."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer

from flm.worker.vocabularies.token_bytes import byte_level_alphabet

SENTENCES = [
    "the cat sat on the mat and the dog sat on the cat",
    "she sells sea shells on the sea shore, and the shells that she sells are sea shells",
    "人工智能是一门新的技术科学，研究人的智能。",
    "Grüße aus Köln! don't WE'VE 12345 67,890.12",
    "def f(x):\n    return x + 1  # two  spaces\n\n",
    "问：你好\n\n答：你好，我是人工智能。 [Round 1]",
]


def sentencepiece_model(*user_defined: str, **options: Any) -> bytes:
    """A trained model: byte fallback, no normalisation, no space in front unless asked for, as most checkpoints."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_writer=out,
        minloglevel=2,
        **{
            "model_type": "bpe",
            "vocab_size": 420,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "user_defined_symbols": list(user_defined),
            **options,
        },
    )
    return out.getvalue()


def byte_pairs(pattern: str, merges: int = 60) -> RustTokenizer:
    """Byte-level BPE trained with the `tokenizers` library."""
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return tokenizer


def rank_file(tokenizer: RustTokenizer) -> bytes:
    """The same vocabulary as "base64 rank" lines: bytes first, then what merges make, in their order."""
    alphabet = byte_level_alphabet()
    vocab = tokenizer.get_vocab()
    tokens = [
        bytes(alphabet[c] for c in token) for token in sorted(vocab, key=lambda t: (len(t) > 1, vocab[t]))
    ]
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def write(directory: Path, files: dict[str, bytes | str | dict[str, Any]]) -> Path:
    """The directory with these files; dictionaries become JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, dict):
            content = json.dumps(content)
        (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return directory
