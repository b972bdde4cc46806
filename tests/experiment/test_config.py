import json
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest

from thimble_zarr.errors import ConfigError
from thimble_zarr.experiment.config import CHOICES, HELP, TrainingConfig, read_toml
from thimble_zarr.experiment.optimizers import OPTIMIZERS, OWN

NAMES = [known.name for known in fields(TrainingConfig)]

NONE_IS_DEFAULT = TrainingConfig(
    steps=3,
    batch_size=5,
    seq_len=7,
    optimizer="adam",
    lr=0.125,
    weight_decay=0.25,
    beta1=0.5,
    beta2=0.75,
    eps=0.0625,
    amsgrad=True,
    dtype="float32",
    compute_dtype="bfloat16",
    loss_chunk=0,
    device="cpu",
    seed=11,
    vocab_size=300,
    hidden_dim=12,
    layers=1,
    heads=3,
    init_scale=0.5,
    optimizer_impl="fused",
    double_shift=True,
    corpus=Path("corpus.txt"),
    tokenizer=Path("tokenizer.json"),
    token_mask=Path("mask.safetensors"),
    every=2,
    windows="1:1",
    variables="W",
    record_tokens="dead",
    coding="predicted",
)
"""A setting lost on the way shows: every one differs from its default, but those of others."""

OF_OTHERS = OWN - OPTIMIZERS["adam"].defaults.keys()
"""Settings that only other optimizers have: `test_optimizers` has them."""


def test_no_setting_of_the_example_is_its_default() -> None:
    default = TrainingConfig()
    assert [
        name
        for name in NAMES
        if getattr(NONE_IS_DEFAULT, name) == getattr(default, name) and name not in OF_OTHERS
    ] == []


def test_the_defaults_are_the_original_notebooks() -> None:
    notebook = {
        "steps": 1000,
        "batch_size": 128,
        "seq_len": 128,
        "lr": 1e-3,
        "weight_decay": 0.0,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "dtype": "bfloat16",
        "seed": 42,
        "vocab_size": 10_000,
        "hidden_dim": 64,
        "layers": 2,
        "heads": 2,
        "init_scale": 0.02,
    }
    config = TrainingConfig()
    assert {name: config.to_json()[name] for name in notebook} == notebook
    assert not config.double_shift  # the one place where the default is not the notebook's


def test_every_setting_is_explained_and_nothing_else_is() -> None:
    assert list(HELP) == NAMES
    assert all(text.strip() for text in HELP.values())
    assert CHOICES.keys() <= set(NAMES)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("seq_len", -1),
        ("vocab_size", 0),
        ("hidden_dim", 0),
        ("layers", 0),
        ("heads", 0),
        ("lr", -1e-3),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("weight_decay", -0.1),
        ("weight_decay", float("inf")),
        ("eps", -1e-8),
        ("eps", float("nan")),
        ("init_scale", -0.02),
        ("beta1", 1.0),
        ("beta1", -0.1),
        ("beta2", 1.0),
        ("beta2", float("nan")),
        ("dtype", "float16"),
        ("compute_dtype", "float16"),
        ("loss_chunk", -1),
        ("optimizer_impl", "fast"),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is {value!r}, but must be "):
        TrainingConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 1),
        ("lr", 0.0),
        ("weight_decay", 0.0),
        ("eps", 0.0),
        ("beta1", 0.0),
        ("beta2", 0.0),
        ("init_scale", 0.0),
        ("loss_chunk", 0),
        ("seed", 0),
        ("seed", 2**63 - 1),
    ],
)
def test_the_least_and_largest_values_are_taken(name: str, value: object) -> None:
    assert getattr(TrainingConfig(**{name: value}), name) == value


def test_heads_must_divide_the_dimensions() -> None:
    with pytest.raises(
        ConfigError, match=r"hidden_dim is 64, but must be a multiple of heads \(3\)"
    ):
        TrainingConfig(heads=3)
    assert TrainingConfig(heads=4).heads == 4


def test_a_config_cannot_be_changed() -> None:
    config = TrainingConfig()
    with pytest.raises(FrozenInstanceError):
        config.steps = 5  # type: ignore[misc]


def test_settings_survive_toml(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    known = NONE_IS_DEFAULT.to_json().items()
    lines = [f"{name} = {json.dumps(value)}" for name, value in known if value is not None]
    file.write_text("\n".join(lines), encoding="utf-8")
    settings = read_toml(file)
    assert list(settings) == [name for name in NAMES if name not in OF_OTHERS]
    assert TrainingConfig.from_settings(settings) == NONE_IS_DEFAULT


def test_settings_survive_json() -> None:
    recorded = json.loads(json.dumps(NONE_IS_DEFAULT.to_json()))
    assert TrainingConfig.from_settings(recorded) == NONE_IS_DEFAULT
    recorded = json.loads(json.dumps(TrainingConfig().to_json()))
    assert TrainingConfig.from_settings(recorded).to_json() == recorded  # with defaults filled in


def test_settings_not_given_keep_their_defaults() -> None:
    assert TrainingConfig.from_settings({"steps": 7}) == replace(TrainingConfig(), steps=7)


def test_an_integer_is_a_fine_number(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("lr = 1\nweight_decay = 0\n")
    config = TrainingConfig.from_settings(read_toml(file))
    assert (config.lr, config.weight_decay) == (1.0, 0.0)
    assert isinstance(config.lr, float)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('steps = "5"', "steps is '5', but must be a whole number"),
        ("steps = 5.0", r"steps is 5\.0, but must be a whole number"),
        ("steps = true", "steps is True, but must be a whole number"),
        ("lr = true", "lr is True, but must be a number"),
        ('lr = "1e-3"', "lr is '1e-3', but must be a number"),
        ("double_shift = 1", "double_shift is 1, but must be true or false"),
        ("dtype = 16", "dtype is 16, but must be a string"),
        ("device = 0", "device is 0, but must be "),
        ("steps = [5]", r"steps is \[5\], but must be a whole number"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(tmp_path: Path, line: str, expected: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(line)
    with pytest.raises(ConfigError, match=expected):
        TrainingConfig.from_settings(read_toml(file))


@pytest.mark.parametrize("name", ["corpus", "device"])
def test_a_type_is_told_in_words_for_people(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is 3, but must be ") as caught:
        TrainingConfig.from_settings({name: 3})
    assert "pathlib" not in str(caught.value)
    assert "|" not in str(caught.value)


def test_an_unknown_setting_is_refused_and_the_known_are_listed() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'batchsize'") as caught:
        TrainingConfig.from_settings({"batchsize": 3})
    assert all(name in str(caught.value) for name in NAMES)


@pytest.mark.parametrize("content", [b"steps = ", b"steps 5", b"\xff\xfe", b"steps = 1\nsteps = 2"])
def test_a_file_that_is_not_toml_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot read settings from .*run\.toml"):
        read_toml(file)


def test_a_settings_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for file in (tmp_path / "nothing.toml", tmp_path):
        with pytest.raises(ConfigError, match="cannot read settings"):
            read_toml(file)
