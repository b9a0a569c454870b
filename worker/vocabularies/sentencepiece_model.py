"""SentencePiece models (Kudo and Richardson, EMNLP 2018): tokenizer.model, with the tokens that a checkpoint adds.

A model's own control tokens, and whatever the checkpoint calls special, are found before SentencePiece sees the text:
to it they are control pieces, which no text gives. A model that puts a space in front of a text puts it in front of
every text between special tokens, as Llama's first tokenizers did; `legacy: false` keeps it to the beginning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from flm.worker.errors import CheckpointError
from flm.worker.vocabularies.base import AddedToken, Splitter, SplitVocabulary
from flm.worker.vocabularies.config import TokenizerConfig
from flm.worker.vocabularies.token_bytes import TokenBytes

SPACE = "\u2581"  # SentencePiece's space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# User-defined pieces that begin or end a turn: InternLM's, Baichuan's, MiniCPM's, ChatML's and their like.
_ROLE_MARKS = re.compile(r"<eo[ah]>|<reserved_\d+>|<用户>|<AI>|<\|(?!tab\||blank_)\w+\|>")
Model = Any  # a ModelProto; the generated module has no types


class SentencePieceVocabulary(SplitVocabulary):
    """`model` is changed: pieces that are `added` become control pieces.

    inside: added tokens that SentencePiece finds itself, being user-defined pieces of the model; texts in which special
    tokens are not to be read go without them.
    """

    def __init__(
        self,
        model: Model,
        added: Mapping[str, AddedToken],
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        prefix_each_run: bool = True,
        inside: AbstractSet[str] = frozenset(),
    ) -> None:
        super().__init__([piece.piece for piece in model.pieces], added, prefix, suffix)
        sentencepiece.set_min_log_level(2)  # it warns of pieces that no text gives
        self.splitter = Splitter({spelt: token for spelt, token in added.items() if spelt not in inside})
        taken = {token.id for spelt, token in added.items() if spelt not in inside}
        _control(model, lambda i, spelt: (i in taken or spelt in added) and spelt not in inside)
        dummy_prefix = bool(model.normalizer_spec.add_dummy_prefix)
        each_run = prefix_each_run or not dummy_prefix
        self._with_marks = _processors(model, each_run)
        _control(model, lambda i, spelt: spelt in inside)
        self._without = _processors(model, each_run) if inside else self._with_marks
        self.pieces = TokenBytes(
            self.token, byte_fallback=True, replacements=((SPACE, " "),), strip=int(dummy_prefix)
        )

    def _encode_run(self, run: str, first: bool, parse_special: bool) -> list[int]:
        at_first, later = self._with_marks if parse_special else self._without
        return list((at_first if first else later).encode(run))


def _control(model: Model, which: Callable[[int, str], bool]) -> None:
    """Pieces that no text gives from now on."""
    for i, piece in enumerate(model.pieces):
        if piece.type != UNKNOWN and which(i, piece.piece):
            piece.type = CONTROL


def _processors(model: Model, each_run: bool) -> tuple[SentencePieceProcessor, SentencePieceProcessor]:
    """For the beginning of a text and for what follows special tokens, which goes without the space in front unless
    each_run."""
    first = SentencePieceProcessor(model_proto=model.SerializeToString())
    if each_run:
        return first, first
    model.normalizer_spec.add_dummy_prefix = False
    later = SentencePieceProcessor(model_proto=model.SerializeToString())
    model.normalizer_spec.add_dummy_prefix = True
    return first, later


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
    marks = role_marks(model)
    return {
        piece.piece: AddedToken(i)
        for i, piece in enumerate(model.pieces)
        if piece.type in (UNKNOWN, CONTROL) or piece.piece in marks
    }


def role_marks(model: Model) -> frozenset[str]:
    """User-defined pieces that are special all the same."""
    spelt = (piece.piece for piece in model.pieces if piece.type == USER_DEFINED)
    return frozenset(piece for piece in spelt if _ROLE_MARKS.fullmatch(piece))


def read(
    file: Path, data: bytes, config: TokenizerConfig
) -> tuple[SentencePieceVocabulary, list[str | None]]:
    """The vocabulary of a Llama-like checkpoint, and its tokens that begin and end a text. CheckpointError."""
    model = parse(data, file)
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    named = {spelt: AddedToken(ids[spelt]) for spelt in config.roles if spelt in ids and len(spelt) > 1}
    added = own_tokens(model) | named | config.added
    wrong = {spelt: token.id for spelt, token in config.added.items() if ids.get(spelt, token.id) != token.id}
    for spelt, i in wrong.items():
        raise config.fields.fail(f"added token {spelt!r}: id {ids[spelt]} of {file.name} expected, found {i}")
    ids |= {spelt: token.id for spelt, token in added.items()}
    names = [config.token(name) or _piece(model, name) for name in ("bos_token", "eos_token")]
    bos, eos = (ids.get(name) if name else None for name in names)
    prefix = [bos] if bos is not None and config.fields.flag("add_bos_token", True) else []
    suffix = [eos] if eos is not None and config.fields.flag("add_eos_token", False) else []
    each_run = config.fields.get("legacy") is not False
    inside = role_marks(model) - named.keys() - config.added.keys()
    try:
        vocabulary = SentencePieceVocabulary(model, added, prefix, suffix, each_run, inside)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(str(file), f"SentencePiece refuses it: {error}") from error
    return vocabulary, names


def _piece(model: Model, name: str) -> str | None:
    """The trainer's own idea of what begins or ends a text."""
    i = getattr(model.trainer_spec, name.replace("_token", "_id"))
    return str(model.pieces[i].piece) if 0 <= i < len(model.pieces) else None


def rebuild(
    tokens: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    dummy_prefix: bool,
    unknown: int | None = None,
) -> Model:
    """A BPE model of these pieces. SentencePiece knows no pieces that are empty or twice there: no text gives these;
    nor more than one `unknown` piece: the others are control pieces."""
    model = sentencepiece_model_pb2.ModelProto()
    seen: set[str] = set()
    for i, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        if not token or token in seen:
            token, kind = f"{SPACE}<{i}>{SPACE}", UNUSED
        seen.add(token)
        model.pieces.add(piece=token, score=score, type=kind)
    of_type = [i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN]
    if unknown is None:
        unknown = of_type[0] if of_type else 0
    for i in of_type:
        model.pieces[i].type = CONTROL
    model.pieces[unknown].type = UNKNOWN
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.byte_fallback = any(piece.type == BYTE for piece in model.pieces)
    trainer.unk_id = unknown
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = dummy_prefix
    normalizer.remove_extra_whitespaces = False
    return model
