"""The caption vocabulary: byte-pair encoding learnt from captions, with BPE dropout.

A sentencepiece BPE model with byte fallback, so that no text is unknown. Captions are cleaned by
`captions.clean` first (NFKC, lower case), so the model itself normalises nothing.
"""

import heapq
import io
import re
from pathlib import Path

import numpy as np
import sentencepiece as spm

from cluster.manifest import FolderError, read_manifest, write_bytes, write_manifest
from cluster.settings import SettingError
from data_pipeline.captions import clean

MODEL_NAME = "bpe.model"
SPACE = "\u2581"  # how sentencepiece writes a word's start


class Vocabulary:
    """Text <-> ids of one BPE model. Ids run from 0 to `size - 1`."""

    def __init__(self, model: bytes) -> None:
        self.model = spm.SentencePieceProcessor(model_proto=model)
        self.size = self.model.get_piece_size()
        self._ids = {self.model.id_to_piece(i): i for i in range(self.size)}
        self._scores = [self.model.get_score(i) for i in range(self.size)]

    def encode(self, caption: str) -> list[int]:
        """Ids of the cleaned caption."""
        return self.model.encode(clean(caption))

    def encode_with_dropout(self, caption: str, dropout: float, random: np.random.Generator) -> list[int]:
        """Ids with each merge skipped with probability `dropout` (Provilkov et al. 2020, BPE-dropout).

        `random` decides alone, so the same generator state gives the same ids on any machine.
        """
        text = clean(caption).replace(" ", SPACE)
        pieces = list(SPACE + text) if text else []
        while True:
            merges = [
                (-self._scores[self._ids[a + b]], i)
                for i, (a, b) in enumerate(zip(pieces[:-1], pieces[1:], strict=True))
                if a + b in self._ids
            ]
            kept = [merge for merge in merges if random.random() >= dropout] if dropout else merges
            if not kept:
                break
            heapq.heapify(kept)
            _, at = kept[0]
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        return [i for piece in pieces for i in self._piece_ids(piece)]

    def decode(self, ids: list[int]) -> str:
        """The text of the ids."""
        return self.model.decode(ids)

    def _piece_ids(self, piece: str) -> list[int]:
        if piece in self._ids:
            return [self._ids[piece]]
        return [self._ids[f"<0x{byte:02X}>"] for byte in piece.encode()]


def learn_vocabulary(captions: list[str], size: int, folder: Path, settings: dict, images: str) -> None:
    """Learn a vocabulary of `size` entries (256 of them bytes) and write it as a `vocab` folder.

    Deterministic in the captions and their order. SettingError if the captions hold too little text
    for the size, or too many characters.
    """
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter([clean(caption) for caption in captions]),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            byte_fallback=True,
            normalization_rule_name="identity",
            character_coverage=1.0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        most = re.search(r"value <= (\d+)", str(error))
        least = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        hint = f"; at most {most[1]}" if most else f"; at least {least[1]}" if least else f" ({error})"
        raise SettingError(f"vocab_size={size} does not fit {len(captions)} captions{hint}") from None
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / MODEL_NAME, model.getvalue())
    write_manifest(folder, "vocab", settings, {"entries": size}, [MODEL_NAME], {"images": images})


def open_vocabulary(folder: Path) -> tuple[Vocabulary, str]:
    """The vocabulary of a `vocab` folder and its fingerprint."""
    manifest = read_manifest(folder, "vocab")
    try:
        return Vocabulary((folder / MODEL_NAME).read_bytes()), manifest.fingerprint
    except (RuntimeError, OSError) as error:
        raise FolderError(f"{folder / MODEL_NAME} cannot be read: {error}") from None
