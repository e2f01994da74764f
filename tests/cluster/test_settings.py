"""Settings: what is accepted, what is refused, and that the refusal names the key."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from cluster.settings import SettingError, from_dict, load_settings, section, setting, to_dict, to_toml


@dataclass(frozen=True)
class Model:
    width: int = setting(8, "width")
    act: Literal["gelu", "relu"] = setting("gelu", "activation")
    rates: tuple[float, ...] = setting((0.5, 0.25), "rates")


@dataclass(frozen=True)
class Config:
    top_k: int = setting(0, "kept")
    rate: float = setting(0.1, "learning rate")
    out: str = setting("run", "folder")
    resume: bool = setting(True, "go on")
    names: tuple[str, ...] = setting((), "names")
    model: Model = section(Model)

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise SettingError(f"rate={self.rate} must be above 0")


@pytest.fixture
def presets(tmp_path: Path) -> Path:
    folder = tmp_path / "presets"
    folder.mkdir()
    (folder / "tiny.toml").write_text("top_k = 3\nrate = 0.5\n[model]\nwidth = 4\n")
    (folder / "broken.toml").write_text("top_k = = 3\n")
    (folder / "typo.toml").write_text("[model]\nwitdh = 4\n")
    return folder


@pytest.mark.parametrize("words", [["--top-k", "50"], ["--top-k=50"], ["top_k=50"], ["--top_k", "50"]])
def test_a_flag_is_the_same_as_a_word(words: list[str], presets: Path) -> None:
    assert load_settings(Config, words, presets) == Config(top_k=50)


def test_words_change_the_file_and_the_file_changes_the_defaults(presets: Path) -> None:
    config = load_settings(Config, ["tiny", "rate=2", "model.act=relu"], presets)
    assert config == Config(top_k=3, rate=2.0, model=Model(width=4, act="relu"))
    assert type(config.rate) is float
    assert load_settings(Config, [str(presets / "tiny.toml")], presets) == load_settings(Config, ["tiny"], presets)


def test_a_flag_without_value_is_true_and_swallows_no_word_that_follows(presets: Path) -> None:
    assert load_settings(Config, ["--resume", "top_k=4"], presets) == Config(top_k=4)
    assert load_settings(Config, ["--resume", "--top-k", "4"], presets) == Config(top_k=4)
    assert load_settings(Config, ["--resume", "false"], presets) == Config(resume=False)


def test_plain_words_are_the_values_of_the_settings_that_take_them_in_order(presets: Path) -> None:
    plain = ("out", "names")
    config = load_settings(Config, ["here", "a,b", str(presets / "tiny.toml"), "rate=2"], presets, plain)
    assert config == Config(top_k=3, rate=2.0, out="here", names=("a", "b"), model=Model(width=4))
    assert load_settings(Config, ["here", "out=there"], presets, plain).out == "there"
    with pytest.raises(SettingError, match="x y z: there are more plain words than out, names"):
        load_settings(Config, ["x", "y", "z"], presets, plain)


def test_text_is_taken_as_it_is_and_lists_are_cut_at_commas(presets: Path) -> None:
    config = load_settings(Config, ["out=12", "names=a,b c", "model.rates=1,0.5"], presets)
    assert config == Config(out="12", names=("a", "b c"), model=Model(rates=(1.0, 0.5)))
    assert load_settings(Config, ['names=["a,b", "c"]'], presets).names == ("a,b", "c")
    assert load_settings(Config, ["--out", "/data/lr=3/run"], presets).out == "/data/lr=3/run"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["topk=1"], ["'topk'", "top_k"]),
        (["model.depth=1"], ["'model.depth'", "width"]),
        (["typo"], ["'model.witdh'", "width"]),
        (["top_k=many"], ["top_k='many'", "int"]),
        (["top_k=1.5"], ["top_k=1.5", "int"]),
        (["top_k=true"], ["top_k=True", "int"]),
        (["resume=1"], ["resume=1", "bool"]),
        (["model.act=swish"], ["model.act='swish'", "'gelu'", "'relu'"]),
        (["model.rates=1,x"], ["model.rates", "list"]),
        (["model.rates=[true]"], ["model.rates[0]=True", "float"]),
        (["model=3"], ["'model'", "section"]),
        (["top_k.deep=3"], ["top_k", "int"]),
        (["top_k=1", "top_k.deep=3"], ["'top_k.deep'", "'top_k'"]),
        (["rate=-1"], ["rate=-1.0", "above 0"]),
        (["huge"], ["'huge'", "tiny"]),
        (["nowhere/huge.toml"], ["nowhere/huge.toml", "does not exist"]),
        (["tiny", "broken"], ["one settings file", "tiny broken"]),
        (["broken"], ["broken.toml", "not valid TOML"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(words: list[str], named: list[str], presets: Path) -> None:
    with pytest.raises(SettingError) as caught:
        load_settings(Config, words, presets)
    text = str(caught.value)
    assert "\n" not in text
    for part in named:
        assert part in text


def test_toml_reads_back_as_the_same_settings(tmp_path: Path) -> None:
    config = Config(
        top_k=-5,
        rate=1e-08,
        out='a "quoted" \\ path\nwith a tab\t, a \x7f and a \U0001f600',
        resume=False,
        names=("x,y", ""),
        model=Model(width=2**40, act="relu", rates=(1e22, 0.1)),
    )
    path = tmp_path / "settings.toml"
    path.write_text(to_toml(config))
    assert load_settings(Config, [str(path)], tmp_path) == config


def test_dict_reads_back_as_the_same_settings() -> None:
    config = Config(names=("a", "b"), model=Model(rates=(0.5,)))
    assert from_dict(Config, to_dict(config)) == config
