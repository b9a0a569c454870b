"""SentencePiece models (Kudo and Richardson, EMNLP 2018): tokenizer.model, with the tokens that a checkpoint adds.

A model's own control tokens, and whatever the checkpoint calls special, are found before SentencePiece sees the text:
to it they are control pieces, which no text gives. A model that puts a space in front of a text puts it in front of
every text between special tokens, as Llama's first tokenizers did; `legacy: false` keeps it to the beginning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from flm.worker.errors import CheckpointError
from flm.worker.vocabularies.base import AddedToken, SplitVocabulary
from flm.worker.vocabularies.config import TokenizerConfig
from flm.worker.vocabularies.token_bytes import TokenBytes

SPACE = "\u2581"  # SentencePiece's space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# User-defined pieces that begin or end a turn: InternLM's and Baichuan's.
_ROLE_MARKS = re.compile(r"<eoh>|<eoa>|<reserved_\d+>")
Model = Any  # a ModelProto; the generated module has no types


class SentencePieceVocabulary(SplitVocabulary):
    """`model` is changed: pieces that are `added` become control pieces."""

    def __init__(
        self,
        model: Model,
        added: Mapping[str, AddedToken],
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        prefix_each_run: bool = True,
    ) -> None:
        super().__init__([piece.piece for piece in model.pieces], added, prefix, suffix)
        sentencepiece.set_min_log_level(2)  # it warns of pieces that no text gives
        taken = {token.id for token in added.values()}
        for i, piece in enumerate(model.pieces):
            if (i in taken or piece.piece in added) and piece.type != UNKNOWN:
                piece.type = CONTROL
        self._first = self._later = SentencePieceProcessor(model_proto=model.SerializeToString())
        dummy_prefix = bool(model.normalizer_spec.add_dummy_prefix)
        if dummy_prefix and not prefix_each_run:
            model.normalizer_spec.add_dummy_prefix = False
            self._later = SentencePieceProcessor(model_proto=model.SerializeToString())
        self.pieces = TokenBytes(
            self.token, byte_fallback=True, replacements=((SPACE, " "),), strip=int(dummy_prefix)
        )

    def _encode_run(self, run: str, first: bool) -> list[int]:
        return list((self._first if first else self._later).encode(run))


def parse(data: bytes, file: Path) -> Model:
    """The ModelProto in `data`. Raises CheckpointError."""
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(data)
    except Exception as error:  # protobuf's DecodeError has no stable home
        raise CheckpointError(str(file), f"not a SentencePiece model: {error}") from error
    if not model.pieces:
        raise CheckpointError(str(file), "not a SentencePiece model: it has no pieces")
    return model


def own_tokens(model: Model) -> dict[str, AddedToken]:
    """The model's special tokens."""
    return {
        piece.piece: AddedToken(i)
        for i, piece in enumerate(model.pieces)
        if piece.type in (UNKNOWN, CONTROL)
        or (piece.type == USER_DEFINED and _ROLE_MARKS.fullmatch(piece.piece))
    }


def read(
    file: Path, data: bytes, config: TokenizerConfig
) -> tuple[SentencePieceVocabulary, list[str | None]]:
    """The vocabulary of a Llama-like checkpoint, and its tokens that begin and end a text. CheckpointError."""
    model = parse(data, file)
    added = own_tokens(model) | config.added
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    wrong = {spelt: token.id for spelt, token in config.added.items() if ids.get(spelt, token.id) != token.id}
    for spelt, i in wrong.items():
        raise config.fields.fail(f"added token {spelt!r}: id {ids[spelt]} of {file.name} expected, found {i}")
    ids |= {spelt: token.id for spelt, token in added.items()}
    names = [config.token(name) or _piece(model, name) for name in ("bos_token", "eos_token")]
    bos, eos = (ids.get(name) if name else None for name in names)
    prefix = [bos] if bos is not None and config.fields.flag("add_bos_token", True) else []
    suffix = [eos] if eos is not None and config.fields.flag("add_eos_token", False) else []
    each_run = config.fields.get("legacy") is not False
    try:
        vocabulary = SentencePieceVocabulary(model, added, prefix, suffix, each_run)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(str(file), f"SentencePiece refuses it: {error}") from error
    return vocabulary, names


def _piece(model: Model, name: str) -> str | None:
    """The trainer's own idea of what begins or ends a text."""
    i = getattr(model.trainer_spec, name.replace("_token", "_id"))
    return str(model.pieces[i].piece) if 0 <= i < len(model.pieces) else None


def rebuild(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], dummy_prefix: bool
) -> Model:
    """A BPE model of these pieces. SentencePiece knows no pieces that are empty or twice there: no text gives these."""
    model = sentencepiece_model_pb2.ModelProto()
    seen: set[str] = set()
    for i, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        if not token or token in seen:
            token, kind = f"{SPACE}<{i}>{SPACE}", UNUSED
        seen.add(token)
        model.pieces.add(piece=token, score=score, type=kind)
    unknown = [i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN]
    if not unknown:
        unknown = [0]
        model.pieces[0].type = UNKNOWN
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.byte_fallback = any(piece.type == BYTE for piece in model.pieces)
    trainer.unk_id = unknown[0]
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = dummy_prefix
    normalizer.remove_extra_whitespaces = False
    return model
