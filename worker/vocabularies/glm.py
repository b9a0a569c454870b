"""ChatGLM's tokenizers, which are SentencePiece models with rules around them.

ChatGLM2 and ChatGLM3 (tokenizer.model): commands follow the pieces and are never read out of a text, but for roles;
every text begins with [gMASK] sop. ChatGLM-6B (ice_text.model): line ends, tabs and runs of spaces are pieces; every
text ends with [gMASK] <sop>. Behaviour: tokenization_chatglm.py of the checkpoints.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from flm.worker.errors import CheckpointError
from flm.worker.files.json_fields import read_json
from flm.worker.vocabularies.base import AddedToken
from flm.worker.vocabularies.config import TokenizerConfig
from flm.worker.vocabularies.sentencepiece_model import (
    BYTE,
    CONTROL,
    SPACE,
    USER_DEFINED,
    SentencePieceVocabulary,
    own_tokens,
    parse,
)
from flm.worker.vocabularies.token_bytes import TokenBytes

_COMMANDS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


def read_chatglm2(file: Path, data: bytes) -> tuple[SentencePieceVocabulary, list[str | None]]:
    """ChatGLM2 and ChatGLM3. Raises CheckpointError."""
    model = parse(data, file)
    first = len(model.pieces)
    added = own_tokens(model)
    ends = [str(model.pieces[i].piece) for i in (1, 2) if i < first]
    for i, spelt in enumerate((*_COMMANDS, *_ROLES), first):
        # "sop" is a word like any other, but for templates that write [gMASK]sop
        after = {"sop": "[gMASK]", "eop": "[gMASK]sop"}.get(spelt, "")
        added[spelt] = AddedToken(i, after=after)
    prefix = [added["[gMASK]"].id, added["sop"].id]
    return SentencePieceVocabulary(model, added, prefix), [None, ends[-1] if ends else None]


# ------------------------------------------------------------------------------------------------------ ChatGLM-6B

_MAX_BLANKS = 80
_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
_LINE_END, _TAB = "<n>", "<|tab|>"
_BLANKS = re.compile(" {2,80}")


class IceTextVocabulary(SentencePieceVocabulary):
    """ChatGLM-6B. `shift` is added to the model's ids: the first revisions had image tokens in front."""

    def __init__(self, model: Any, added: dict[str, AddedToken], shift: int, suffix: list[int]) -> None:
        inner = {spelt: AddedToken(token.id - shift, token.special) for spelt, token in added.items()}
        super().__init__(model, inner, suffix=suffix)
        self._shift = shift
        self.added, self.size = added, self.size + shift
        self.longest = max(self.longest, _MAX_BLANKS)
        self.splitter = type(self.splitter)(added)
        self.special_ids = frozenset(token.id for token in added.values())
        self._masks = {added[spelt].id for spelt in ("[MASK]", "[gMASK]")}
        blanks = {f"<|blank_{n}|>": " " * n for n in range(2, _MAX_BLANKS + 1)}
        self.pieces = TokenBytes(
            self.token,
            byte_fallback=True,
            replacements=((SPACE, " "),),
            strip=self.pieces.strip,
            texts={_LINE_END: "\n", _TAB: "\t"} | blanks,
        )

    def token_id(self, token: str) -> int | None:
        found = super().token_id(token)
        return None if found is None else found + self._shift

    def token(self, token_id: int) -> str | None:
        return super().token(token_id - self._shift)

    def _encode_run(self, run: str, first: bool, parse_special: bool) -> list[int]:
        text = run.replace("\n", _LINE_END).replace("\t", _TAB)
        text = _BLANKS.sub(lambda found: f"<|blank_{len(found[0])}|>", text)
        return [i + self._shift for i in super()._encode_run(text, first, parse_special)]

    def _with_ends(self, ids: list[int]) -> list[int]:
        """A text that has a mask already gets no other."""
        return ids + (self.suffix[1:] if self._masks & set(ids) else self.suffix)


def read_ice_text(
    file: Path, data: bytes, config: TokenizerConfig
) -> tuple[IceTextVocabulary, list[str | None]]:
    """ChatGLM-6B. Raises CheckpointError."""
    model = parse(data, file)
    shift = _image_tokens(file, config)
    places = {piece.piece: i for i, piece in enumerate(model.pieces)}
    if not places.keys() & set(_SPECIAL):
        places |= _complete(model)
    missing = [spelt for spelt in ("[gMASK]", "<sop>", "<eop>") if spelt not in places]
    if missing:
        raise CheckpointError(str(file), f"a piece {missing[0]!r} expected beside its other special ones")
    added = own_tokens(model) | {spelt: AddedToken(places[spelt]) for spelt in _SPECIAL if spelt in places}
    shifted = {spelt: AddedToken(token.id + shift) for spelt, token in added.items()}
    suffix = [shifted["[gMASK]"].id, shifted["<sop>"].id]
    try:
        vocabulary = IceTextVocabulary(model, shifted, shift, suffix)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(str(file), f"SentencePiece refuses it: {error}") from error
    return vocabulary, ["<sop>", "<eop>"]


def _complete(model: Any) -> dict[str, int]:
    """Append what the first revisions' code put behind the file's pieces, and later files have in it: the places of
    the special ones."""
    piece = sentencepiece_model_pb2.ModelProto.SentencePiece
    first = len(model.pieces)
    spaces = (_TAB, *(f"<|blank_{n}|>" for n in range(2, _MAX_BLANKS + 1)))
    model.pieces.extend(piece(piece=spelt, score=0.0, type=CONTROL) for spelt in _SPECIAL)
    model.pieces.extend(piece(piece=spelt, score=0.0, type=USER_DEFINED) for spelt in spaces)
    model.trainer_spec.byte_fallback = True
    model.pieces.extend(piece(piece=f"<0x{b:02X}>", score=0.0, type=BYTE) for b in range(256))
    return {spelt: i for i, spelt in enumerate(_SPECIAL, first)}


def _image_tokens(file: Path, config: TokenizerConfig) -> int:
    """Ids in front of the text's: stated, or as many as config.json's vocabulary tells."""
    stated = config.fields.get("num_image_tokens")
    if type(stated) is int and stated >= 0:
        return stated
    model = file.parent / "config.json"
    bos = read_json(model).get("bos_token_id") if model.is_file() else None
    return 20000 if bos == 150004 else 0
