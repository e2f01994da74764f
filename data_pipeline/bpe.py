"""The caption vocabulary: byte-pair encoding learnt from captions, with BPE dropout.

A sentencepiece BPE model with byte fallback, so that no text is unknown. Captions are cleaned by
`captions.clean` first (NFKC, lower case), so the model itself normalises nothing.
"""

import heapq
import io
import re
from bisect import bisect_left
from collections.abc import Callable
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
        merging = Merging(list(SPACE + text) if text else [], self._cost)
        while merging.live:
            draws = random.random(len(merging.live)) if dropout else None  # one for each merge there is, left to right
            if not merging.merge_best(draws, dropout):
                break
        return [i for piece in merging.pieces for i in self._piece_ids(piece)]

    def decode(self, ids: list[int]) -> str:
        """The text of the ids."""
        return self.model.decode(ids)

    def _cost(self, piece: str) -> float | None:
        """What joining two pieces to this one costs: the least is joined first; None if it is no piece."""
        i = self._ids.get(piece)
        return None if i is None else -self._scores[i]

    def _piece_ids(self, piece: str) -> list[int]:
        if not piece:  # joined to the piece before
            return []
        if piece in self._ids:
            return [self._ids[piece]]
        return [self._ids[f"<0x{byte:02X}>"] for byte in piece.encode()]


class Merging:
    """A text on its way from characters to pieces; a step's time hardly grows with the text."""

    def __init__(self, characters: list[str], cost_of: Callable[[str], float | None]) -> None:
        self.pieces = characters  # each at the place of its first character, "" at the others
        self.cost_of = cost_of
        self.live: list[int] = []  # places of pieces that can be joined to the next, from left to right
        self._after = list(range(1, len(characters) + 1))
        self._before = list(range(-1, len(characters)))
        self._costs: list[float | None] = [None] * len(characters)  # of joining a place's piece to the next
        self._queue: list[tuple[float, int]] = []  # by cost; may hold what has changed since
        for place in range(len(characters) - 1):
            self._look_again(place)

    def merge_best(self, draws: np.ndarray | None, dropout: float) -> bool:
        """Do the cheapest merge, the leftmost of equals, of those not dropped: where draws (live,) >= dropout.

        False if all are dropped.
        """
        dropped: list[tuple[float, int]] = []
        while self._queue:
            cost, place = heapq.heappop(self._queue)
            if self._costs[place] != cost:
                continue
            if draws is None or draws[bisect_left(self.live, place)] >= dropout:
                self._join(place)
                for waiting in dropped:
                    heapq.heappush(self._queue, waiting)
                return True
            dropped.append((cost, place))
        return False

    def _join(self, place: int) -> None:
        joined = self._after[place]
        self.pieces[place] += self.pieces[joined]
        self.pieces[joined] = ""
        self._after[place] = self._after[joined]
        self._before[self._after[place]] = place
        self._set_cost(joined, None)
        self._look_again(place)
        if self._before[place] >= 0:
            self._look_again(self._before[place])

    def _look_again(self, place: int) -> None:
        after = self._after[place]
        cost = self.cost_of(self.pieces[place] + self.pieces[after]) if after < len(self.pieces) else None
        self._set_cost(place, cost)
        if cost is not None:
            heapq.heappush(self._queue, (cost, place))

    def _set_cost(self, place: int, cost: float | None) -> None:
        if (cost is None) != (self._costs[place] is None):
            at = bisect_left(self.live, place)
            if cost is None:
                self.live.pop(at)
            else:
                self.live.insert(at, place)
        self._costs[place] = cost


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
