"""The vocabulary: no text is unknown, and dropout is sentencepiece's own encoding with merges left out."""

from pathlib import Path

import numpy as np
import pytest

from cluster.manifest import NAME, FolderError
from cluster.settings import SettingError
from data_pipeline.bpe import MODEL_NAME, Vocabulary, learn_vocabulary, open_vocabulary
from data_pipeline.captions import clean
from data_pipeline.shards import read_foreign
from data_pipeline.sources import EMBEDDED

STRANGE = [
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
    "\u4e2d\u6587\u5b57 mosaic",
    "tab\there, null\x00, bell\x07, escape\x1b[0m, delete\x7f",
    "A  B   C",
    "<unk> <0x41> </s> <s>",
    "\u200b",
    "\ufdfa \u00bd \u212b",
    "e\u0301\u0323 \U0001d538",
    "x" * 300,
]


@pytest.fixture(scope="module")
def captions() -> list[str]:
    return [sample.files["txt"].decode() for sample in read_foreign(EMBEDDED / "train-00003.tar.gz")]


@pytest.fixture(scope="module")
def vocabulary(captions: list[str], tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("vocab")
    learn_vocabulary(captions, 700, folder, {}, "")
    return open_vocabulary(folder)[0]


def test_the_vocabulary_is_learnt_alike_twice_and_knows_its_images(captions: list[str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        learn_vocabulary(captions, 600, tmp_path / name, {"seed": 1}, "f" * 64)
    assert (tmp_path / "a" / MODEL_NAME).read_bytes() == (tmp_path / "b" / MODEL_NAME).read_bytes()
    (vocabulary, one), (_, two) = open_vocabulary(tmp_path / "a"), open_vocabulary(tmp_path / "b")
    assert vocabulary.size == 600 and one == two
    assert '"images": "ffff' in (tmp_path / "a" / NAME).read_text()


@pytest.mark.parametrize("text", STRANGE)
def test_no_text_is_unknown(vocabulary: Vocabulary, text: str) -> None:
    for ids in (vocabulary.encode(text), vocabulary.encode_with_dropout(text, 0.5, np.random.default_rng(0))):
        assert ids and all(0 <= i < vocabulary.size for i in ids)
        assert vocabulary.model.unk_id() not in ids
        assert vocabulary.decode(ids) == clean(text)


def test_dropout_of_nothing_is_the_encoding_of_sentencepiece(vocabulary: Vocabulary, captions: list[str]) -> None:
    random = np.random.default_rng(0)
    joined = [" and ".join(captions[n : n + 3]) for n in range(50)]
    for text in [*captions, *joined, *STRANGE, "", "  "]:
        assert vocabulary.encode_with_dropout(text, 0.0, random) == vocabulary.encode(text)


def test_dropout_splits_pieces_and_keeps_the_text(vocabulary: Vocabulary, captions: list[str]) -> None:
    random = np.random.default_rng(0)
    lengths = []
    for dropout in (0.0, 0.1, 0.5, 1.0):
        encoded = [vocabulary.encode_with_dropout(text, dropout, random) for text in captions[:100]]
        assert [vocabulary.decode(ids) for ids in encoded] == [clean(text) for text in captions[:100]]
        assert all(0 <= i < vocabulary.size for ids in encoded for i in ids)
        lengths.append(sum(map(len, encoded)))
    assert lengths == sorted(set(lengths))
    assert lengths[1] < 1.3 * lengths[0]
    assert lengths[3] == sum(len(clean(text)) + 1 for text in captions[:100])


def defined(vocabulary: Vocabulary, text: str, dropout: float, random: np.random.Generator) -> list[str]:
    """BPE-dropout by its definition: at each step a draw for every possible merge, from left to right, and the
    cheapest merge that is not dropped."""
    characters = clean(text).replace(" ", "\u2581")
    pieces = ["\u2581", *characters] if characters else []
    ids = {vocabulary.model.id_to_piece(i): i for i in range(vocabulary.size)}
    while True:
        places = [at for at in range(len(pieces) - 1) if pieces[at] + pieces[at + 1] in ids]
        kept = [at for at in places if not dropout or random.random() >= dropout]
        if not kept:
            return pieces
        best = min(kept, key=lambda at: (-vocabulary.model.get_score(ids[pieces[at] + pieces[at + 1]]), at))
        pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_ids_and_draws_are_those_of_the_definition(vocabulary: Vocabulary, captions: list[str], dropout: float) -> None:
    joined = [" and ".join(captions[n : n + 1 + n % 4]) for n in range(40)]
    for n, text in enumerate([*joined, *STRANGE, "aaaaaaaaaa", "abababababab", "", " "]):
        one, other = np.random.default_rng(n), np.random.default_rng(n)
        pieces = defined(vocabulary, text, dropout, one)
        known = {vocabulary.model.id_to_piece(i) for i in range(vocabulary.size)}
        expected = [
            p for piece in pieces for p in ([piece] if piece in known else [f"<0x{b:02X}>" for b in piece.encode()])
        ]
        ids = vocabulary.encode_with_dropout(text, dropout, other)
        assert [vocabulary.model.id_to_piece(i) for i in ids] == expected
        assert one.random() == other.random()  # as many numbers were drawn


def test_dropout_depends_on_the_generator_alone(vocabulary: Vocabulary, captions: list[str]) -> None:
    np.random.seed(1)
    one = [vocabulary.encode_with_dropout(text, 0.3, np.random.default_rng(n)) for n, text in enumerate(captions[:50])]
    np.random.seed(2)
    vocabulary.encode_with_dropout("something in between", 0.3, np.random.default_rng(99))
    two = [vocabulary.encode_with_dropout(text, 0.3, np.random.default_rng(n)) for n, text in enumerate(captions[:50])]
    other = [vocabulary.encode_with_dropout(t, 0.3, np.random.default_rng(n + 1)) for n, t in enumerate(captions[:50])]
    assert one == two != other


@pytest.mark.parametrize(("size", "hint"), [(100_000, "at most "), (260, "at least ")])
def test_a_size_that_does_not_fit_names_the_limit(captions: list[str], tmp_path: Path, size: int, hint: str) -> None:
    with pytest.raises(SettingError, match=f"vocab_size={size} .*{hint}") as caught:
        learn_vocabulary(captions, size, tmp_path / "vocab", {}, "")
    assert "\n" not in str(caught.value)
    limit = int(str(caught.value).rsplit(hint, 1)[1].split()[0])
    learn_vocabulary(captions, limit, tmp_path / "vocab", {}, "")
    assert open_vocabulary(tmp_path / "vocab")[0].size == limit


def test_a_damaged_model_is_named(captions: list[str], tmp_path: Path) -> None:
    learn_vocabulary(captions, 600, tmp_path, {}, "")
    (tmp_path / MODEL_NAME).write_bytes(b"not a model")
    with pytest.raises(FolderError, match=r"bpe\.model cannot be read"):
        open_vocabulary(tmp_path)
