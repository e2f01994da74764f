"""The published dVAE files: read without running them, equal to the modules in them, and refused by name if odd."""

import copy
import os
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.command import run_command
from cluster.manifest import FolderError, file_digest, read_manifest
from cluster.settings import UserError
from data_pipeline.loader import Shards
from dvae import openai_export, openai_import
from dvae.config import DvaeConfig
from dvae.likelihood import map_pixels, most_likely_pixels, unmap_pixels
from dvae.model import Dvae
from dvae.openai import published_bytes, published_name, read_published
from dvae.openai_export import ExportConfig, export_dvae
from dvae.openai_import import ImportConfig, import_dvae
from dvae.tokenise import TokeniseConfig, tokenise
from dvae.train import open_dvae
from pretrain.cli import split_verb
from tests.dvae.published import LOUD, Decoder, Encoder, published_classes

SIDE = 32
Pair = tuple[Path, Path]


def save(module: Any, path: Path, in_zip: bool = True) -> Path:
    """As the published files are written: the whole module."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        published_classes(patch)
        warnings.simplefilter("ignore")  # the older form looks for each class's source text
        torch.save(module, path, _use_new_zipfile_serialization=in_zip)
    return path


@pytest.fixture(scope="module")
def modules() -> tuple[Encoder, Decoder]:
    torch.manual_seed(0)
    return Encoder(8, 32), Decoder(8, 32)


@pytest.fixture(params=[True, False], ids=["zip", "stream"])
def pair(request: pytest.FixtureRequest, modules: tuple[Encoder, Decoder], tmp_path: Path) -> Pair:
    names = ("encoder.pkl", "decoder.pkl")
    encoder, decoder = (save(m, tmp_path / n, request.param) for m, n in zip(modules, names, strict=True))
    return encoder, decoder


@pytest.fixture
def imported(pair: Pair, tmp_path: Path) -> Path:
    import_dvae(ImportConfig(str(pair[0]), str(pair[1]), str(tmp_path / "run"), SIDE))
    return tmp_path / "run"


def refusal(encoder: Path, decoder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_published(encoder, decoder, SIDE)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_equal_models(encoder: nn.Module, decoder: nn.Module, model: Dvae, pixels: Tensor) -> None:
    """The same to the last bit: where the decoder enlarges later than theirs, each number is still the same sum."""
    with torch.no_grad():
        logits = encoder(map_pixels(pixels))
        codes = logits.argmax(1)
        assert len(codes.unique()) >= 8
        assert torch.equal(model.encoder(map_pixels(pixels)), logits)
        assert torch.equal(model.encode(map_pixels(pixels)), codes)
        parameters = decoder(F.one_hot(codes, model.config.codebook).permute(0, 3, 1, 2).float())
        decoded = model.decode(codes)
        assert torch.equal(decoded, parameters)
        drawn = unmap_pixels(torch.sigmoid(parameters[:, :3]))
        assert drawn.std() > 0.1
        assert torch.equal(most_likely_pixels(decoded), drawn)


def tiles(side: int) -> Tensor:
    """(3, 3, side, side) of plain patches, 8 pixels wide, in saturated colours: each patch its own code."""
    patches = torch.rand(3, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(1)).round()
    return F.interpolate(patches, scale_factor=8.0)


def test_codes_and_reconstructions_are_those_of_the_published_modules(
    modules: tuple[Encoder, Decoder], imported: Path
) -> None:
    model, about = open_dvae(imported, torch.device("cpu"))
    assert model.config == DvaeConfig(SIDE, 1, 8, 4, 2, 16, 32)
    assert_equal_models(*modules, model, tiles(SIDE))
    assert about.counts["parameters"] == sum(p.numel() for module in modules for p in module.parameters())


def test_the_run_folder_is_as_training_leaves_it(imported: Path, pair: Pair, data: Path, tmp_path: Path) -> None:
    about = read_manifest(imported, "dvae")
    assert sorted(about.files) == ["config.json", "model.safetensors"]
    assert about.made_from == {"encoder": file_digest(pair[0]), "decoder": file_digest(pair[1])}
    import_dvae(ImportConfig(str(pair[0]), str(pair[1]), str(tmp_path / "run16"), 16))
    out = tmp_path / "tokens"
    tokenise(TokeniseConfig(str(data / "images"), str(data / "vocab"), str(tmp_path / "run16"), str(out)))
    assert len(Shards(out, "tokens", "train")) == len(Shards(data / "images", "images", "train"))


def test_a_second_import_changes_nothing_and_one_of_other_weights_is_refused(imported: Path, pair: Pair) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in imported.iterdir()}
    again = ImportConfig(str(pair[0]), str(pair[1]), str(imported), SIDE)
    import_dvae(again)
    assert {path.name: path.stat().st_mtime_ns for path in imported.iterdir()} == before
    save(Decoder(8, 32), pair[1])
    with pytest.raises(FolderError, match="decoder: "):
        import_dvae(again)


def test_an_unfinished_training_run_is_not_written_over(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FolderError, match="unfinished"):
        import_dvae(ImportConfig(str(pair[0]), str(pair[1]), str(tmp_path / "run"), SIDE))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


def test_what_is_exported_loads_into_the_published_modules_and_comes_back(
    modules: tuple[Encoder, Decoder], imported: Path, tmp_path: Path
) -> None:
    out = tmp_path / "exported"
    export_dvae(ExportConfig(str(imported), str(out)))
    torch.manual_seed(7)
    for module, fresh, name in zip(modules, (Encoder(8, 32), Decoder(8, 32)), ("encoder", "decoder"), strict=True):
        fresh.load_state_dict(torch.load(out / f"{name}.pt", weights_only=True))
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), fresh.parameters(), strict=True))
    back, state = read_published(out / "encoder.pt", out / "decoder.pt", SIDE)
    model, about = open_dvae(imported, torch.device("cpu"))
    assert back == model.config
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert read_manifest(out, "openai").made_from == {"dvae": about.fingerprint}


def test_a_dict_of_tensors_is_read_as_the_module_is(modules: tuple[Encoder, Decoder], pair: Pair) -> None:
    whole = read_published(*pair, SIDE)
    for module, path in zip(modules, pair, strict=True):
        torch.save(module.state_dict(), path)
    apart = read_published(*pair, SIDE)
    assert whole[0] == apart[0]
    assert all(torch.equal(whole[1][name], apart[1][name]) for name in whole[1].keys() | apart[1].keys())


def test_a_dvae_of_another_form_is_not_exported() -> None:
    for config in (DvaeConfig(16, 1, 16, 3, 1, 16, 32), DvaeConfig(16, 2, 8, 4, 1, 16, 32)):
        with pytest.raises(UserError, match=f"fold=1 and model.n_groups=4; this dVAE has {config.fold} and"):
            published_bytes(Dvae(config))


def test_every_weight_has_the_name_that_the_released_code_gives_it(modules: tuple[Encoder, Decoder]) -> None:
    model = Dvae(DvaeConfig(SIDE, 1, 8, 4, 2, 16, 32))
    for theirs, ours in zip(modules, (model.encoder, model.decoder), strict=True):
        want = {name: p.shape for name, p in theirs.named_parameters()}
        assert {published_name(name): p.shape for name, p in ours.named_parameters()} == want


class Command:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *words: Any) -> None:
        self.call = (function, words)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("in_zip", [True, False], ids=["zip", "stream"])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, f"{os.name}.system"), (eval, "__builtin__.eval"), (nn.Conv2d, "torch.nn.modules.conv.Conv2d")],
)
def test_a_file_that_calls_anything_is_refused_by_that_name_and_nothing_runs(
    modules: tuple[Encoder, Decoder], pair: Pair, tmp_path: Path, function: Any, name: str, in_zip: bool
) -> None:
    mark = tmp_path / "mark"
    word = {os.system: f"touch {mark}", eval: f"open({str(mark)!r}, 'w')"}.get(function, 3)
    hidden = Encoder(8, 32)
    hidden.innocent = Command(function, word)  # type: ignore[assignment]
    save(hidden, pair[0], in_zip)
    assert refusal(*pair) == f"{pair[0]} refers to '{name}', which the published weights do not need; nothing was run"
    assert not mark.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_pickle_of_any_protocol_is_refused_by_name(pair: Pair, tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "mark"
    pair[0].write_bytes(pickle.dumps(Command(os.system, f"touch {mark}"), protocol))
    assert f"'{os.name}.system'" in refusal(*pair)
    assert not mark.exists()


def test_other_ways_to_a_name_are_refused(pair: Pair) -> None:
    """INST calls without REDUCE, a dotted attribute reaches through a known module, EXT1 through a registry."""
    for program, name in (
        (b"(ios\nsystem\n.", "os.system"),
        (b"\x80\x04\x8c\x05torch\x8c\x11storage.os.system\x93.", "torch.storage.os.system"),
    ):
        pair[0].write_bytes(program)
        assert f"'{name}'" in refusal(*pair)
    pair[0].write_bytes(b"\x80\x02\x82\x01.")
    assert "instruction EXT1" in refusal(*pair)


def test_the_classes_of_the_file_are_never_imported(pair: Pair) -> None:
    assert not [name for name in sys.modules if name.split(".")[0] == "dall_e"]
    read_published(*pair, SIDE)
    assert not [name for name in sys.modules if name.split(".")[0] == "dall_e"]


@pytest.mark.parametrize("which", [0, 1], ids=["encoder", "decoder"])
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.9999])
def test_a_cut_file_is_named(pair: Pair, which: int, share: float) -> None:
    data = pair[which].read_bytes()
    pair[which].write_bytes(data[: int(len(data) * share)])
    assert refusal(*pair).startswith(f"{pair[which]} is cut, damaged, or no file of torch.save")


def test_a_flipped_byte_is_refused_or_only_a_number(pair: Pair) -> None:
    """No damage escapes as another error. A zip checks its contents; the older form cannot see a changed weight."""
    data = pair[0].read_bytes()
    for place in torch.randint(len(data), (25,), generator=torch.Generator().manual_seed(2)).tolist():
        changed = bytearray(data)
        changed[place] ^= 0x41
        pair[0].write_bytes(changed)
        try:
            read_published(*pair, SIDE)
        except UserError as error:
            assert str(pair[0]) in str(error) and "\n" not in str(error)


def test_a_swapped_pair_is_told_as_such(modules: tuple[Encoder, Decoder], pair: Pair) -> None:
    said = f"{pair[1]} holds a dall_e.decoder.Decoder, not a dall_e.encoder.Encoder: are the two files swapped?"
    assert refusal(pair[1], pair[0]) == said
    for module, path in zip(modules, pair, strict=True):
        torch.save(module.state_dict(), path)
    assert refusal(pair[1], pair[0]) == said
    assert "are the two files swapped?" in refusal(pair[0], pair[0])


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("name", "hint"), [("quantize.embed.weight", "; a VQGAN is not read"), ("head.weight", "")])
def test_weights_of_another_network_are_told_as_such(pair: Pair, wrapped: bool, name: str, hint: str) -> None:
    weights = {"encoder.conv_in.weight": torch.zeros(4, 3, 3, 3), name: torch.zeros(8, 4)}
    torch.save({"epoch": 3, "state_dict": weights} if wrapped else weights, pair[0])
    said = f"{pair[0]} has no weights blocks.input.w, so it is not the published encoder"
    assert refusal(*pair).startswith(said + hint) and ("VQGAN" in refusal(*pair)) == bool(hint)


def test_weights_of_another_shape_or_name_are_named(pair: Pair) -> None:
    wide, missing, more, half = Encoder(8, 32), Encoder(8, 32), Encoder(8, 32), Encoder(8, 32).half()
    wide.blocks.group_2.block_1.res_path.conv_2.w = nn.Parameter(torch.zeros(4, 4, 5, 5))  # type: ignore
    del missing.blocks.output.conv.b  # type: ignore[union-attr]
    more.blocks.group_4.block_1.res_path.conv_1.c = nn.Parameter(torch.zeros(3))  # type: ignore
    save(wide, pair[0])
    assert refusal(*pair).startswith(f"{pair[0]}: blocks.group_2.block_1.res_path.conv_2.w has the shape (4, 4, 5, 5)")
    save(missing, pair[0])
    assert refusal(*pair) == f"{pair[0]} lacks the weights 'blocks.output.conv.b'"
    save(more, pair[0])
    assert refusal(*pair).endswith(
        "has, beyond the published ones, the weights 'blocks.group_4.block_1.res_path.conv_1.c'"
    )
    save(half, pair[0])
    assert "'torch.HalfStorage'" in refusal(*pair)


def test_two_files_that_do_not_belong_together_are_told(pair: Pair) -> None:
    save(Encoder(8, 48), pair[0])
    said = f"{pair[0]}: blocks.output.conv.w has the shape (48, 64, 1, 1), where (32, 64, 1, 1) belongs"
    assert refusal(*pair) == said
    save(Encoder(8, 32), pair[0])
    save(Decoder(8, 32, n_blk_per_group=1), pair[1])
    assert refusal(*pair).startswith(f"{pair[1]} lacks the weights 'blocks.group_1.block_2")


def test_another_gain_of_the_residuals_is_refused(pair: Pair) -> None:
    odd = Encoder(8, 32)
    odd.blocks.group_3.block_2.post_gain = 0.5  # type: ignore[union-attr]
    save(odd, pair[0])
    assert refusal(*pair) == f"{pair[0]} scales residual outputs by 0.5, where the published rule gives 0.015625"


def test_a_module_that_holds_itself_comes_to_an_end(pair: Pair) -> None:
    endless = Encoder(8, 32)
    endless._modules["again"] = endless
    save(endless, pair[0])
    assert "its modules have no end" in refusal(*pair)


def test_a_tensor_larger_than_its_numbers_is_refused(pair: Pair) -> None:
    state = {name: p.detach() for name, p in Encoder(8, 32).named_parameters()}
    state["blocks.output.conv.w"] = torch.zeros(1).expand(32, 64, 1, 1)
    torch.save(state, pair[0])
    assert refusal(*pair).startswith(f"{pair[0]} is cut, damaged")


def test_weights_stored_in_another_order_of_axes_are_the_same_weights(
    modules: tuple[Encoder, Decoder], pair: Pair
) -> None:
    whole = read_published(*pair, SIDE)[1]
    save(copy.deepcopy(modules[0]).to(memory_format=torch.channels_last), pair[0])
    turned = read_published(*pair, SIDE)[1]
    assert all(torch.equal(whole[name], turned[name]) and turned[name].is_contiguous() for name in whole)


@pytest.mark.parametrize("in_zip", [True, False], ids=["zip", "stream"])
def test_a_file_of_a_big_endian_machine_is_refused(
    modules: tuple[Encoder, Decoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_zip: bool
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "byteorder", "big")
        path = save(modules[0], tmp_path / "encoder.pkl", in_zip)
    assert refusal(path, path) == f"{path} was written on a big-endian machine"


def test_a_compressed_archive_is_refused(modules: tuple[Encoder, Decoder], pair: Pair, tmp_path: Path) -> None:
    source = save(modules[0], tmp_path / "plain.pkl")
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(pair[0], "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert refusal(*pair).endswith("is compressed, which torch.save does not do")


def test_a_missing_file_and_wrong_words_are_one_line(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = openai_import.COMMAND
    for words, code, said in (
        (["nowhere.pkl", str(pair[1])], 1, "No such file or directory: nowhere.pkl"),
        ([str(pair[0]), str(pair[1]), "third"], 2, "third: there are more plain words than encoder, decoder"),
        ([str(pair[0]), str(pair[1]), "image_side=60"], 2, "image_side=60 must be a multiple of 8"),
        ([str(pair[1]), str(pair[0])], 1, "are the two files swapped?"),
    ):
        assert run_command(command, [*words, f"out={tmp_path / 'run'}"]) == code
        line = capsys.readouterr().err
        assert line.startswith("smalti dvae import: ") and said in line and line.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert run_command(openai_export.COMMAND, [str(tmp_path / "none")]) == 1
    assert "smalti dvae export: dvae folder" in capsys.readouterr().err


def test_the_verbs_take_plain_words(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    verb, words = split_verb(["dvae", "import", *map(str, pair), f"out={run}", "image_side=32"])
    assert (verb, run_command(openai_import.COMMAND, words)) == ("dvae import", 0)
    assert run_command(openai_export.COMMAND, [str(run), "--out", str(out)]) == 0
    assert "dall_e.Decoder(n_init=16, n_hid=8, n_blk_per_group=2, vocab_size=32)" in capsys.readouterr().out
    assert split_verb(["dvae", "emoji-64"]) == ("dvae", ["emoji-64"])


@pytest.mark.parametrize(("n_hid", "n_init", "codebook", "side"), [(8, 16, 32, 64), (256, 128, 8192, 256)])
def test_the_real_package_agrees(tmp_path: Path, n_hid: int, n_init: int, codebook: int, side: int) -> None:
    """With `dall-e` from PyPI (`pip install --no-deps dall-e`, and attrs and requests); the second size is the
    published one."""
    package = pytest.importorskip("dall_e")
    torch.manual_seed(3)
    encoder = package.Encoder(n_hid=n_hid, vocab_size=codebook)
    decoder = package.Decoder(n_hid=n_hid, vocab_size=codebook, n_init=n_init)
    with torch.no_grad():  # the package starts with residuals and embeddings that hardly count, and no biases
        decoder.blocks.input.w *= codebook**0.5
        for name, weight in (*encoder.named_parameters(), *decoder.named_parameters()):
            weight *= LOUD if "res_path" in name else 1
            weight += 0.1 * torch.randn(weight.shape) if name.endswith(".b") else 0
    for module, name in ((encoder, "encoder.pkl"), (decoder, "decoder.pkl")):
        torch.save(module, tmp_path / name)
    import_dvae(ImportConfig(str(tmp_path / "encoder.pkl"), str(tmp_path / "decoder.pkl"), str(tmp_path / "run"), side))
    model, _ = open_dvae(tmp_path / "run", torch.device("cpu"))
    assert_equal_models(encoder, decoder, model, tiles(side)[:2])
    export_dvae(ExportConfig(str(tmp_path / "run"), str(tmp_path / "out")))
    for module, name in ((encoder, "encoder.pt"), (decoder, "decoder.pt")):
        kept = {key: weight.clone() for key, weight in module.state_dict().items()}
        module.load_state_dict(torch.load(tmp_path / "out" / name, weights_only=True))
        assert all(torch.equal(weight, kept[key]) for key, weight in module.state_dict().items())
