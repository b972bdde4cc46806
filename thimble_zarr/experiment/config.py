"""The settings of a Thimble 1 run: one frozen record, read from a TOML file and from flags."""

import functools
import math
import operator
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self, get_args

from thimble_zarr.errors import ConfigError
from thimble_zarr.experiment.optimizers import (
    FROM_0,
    OPTIMIZERS,
    OWN,
    RANGES,
    Choice,
    Setting,
    owners,
)
from thimble_zarr.format.coding import CodingName
from thimble_zarr.record.schedule import Schedule, count_rows, every, windows

AUTO = "auto"
"""The compute dtype that the machine decides."""

CHOICES: Mapping[str, tuple[str, ...]] = {
    "dtype": ("float32", "bfloat16"),
    "compute_dtype": (AUTO, "float32", "bfloat16"),
    "optimizer": (*OPTIMIZERS,),
    "optimizer_impl": ("single", "foreach", "fused"),
    "adjust_lr_fn": ("original", "match_rms_adamw"),
    "record_tokens": ("all", "live", "dead"),
    "coding": get_args(CodingName),
}
"""The settings that take one of a few words."""

HELP: Mapping[str, str] = {
    "steps": "Optimizer steps.",
    "batch_size": "Sequences per step.",
    "seq_len": "Tokens per sequence.",
    "optimizer": "Which of torch's optimizers trains. Each has settings of its own. muon trains "
    "the matrices, and adamw the other parameters with the same learning rate.",
    "lr": "Learning rate.",
    "weight_decay": "Weight decay: decoupled in adamw, muon and adafactor, added to the gradient "
    "in others.",
    "beta1": "Decay rate of the first moment.",
    "beta2": "Decay rate of the second moment.",
    "eps": "Added to the optimizer's denominator.",
    "amsgrad": "Divide by the largest second moment so far (adam, adamw).",
    "momentum": "Factor of the momentum buffer (sgd, rmsprop, muon).",
    "dampening": "Dampening of the gradient in the buffer (sgd).",
    "nesterov": "Nesterov's momentum (sgd, muon).",
    "ns_steps": "Newton-Schulz iterations (muon).",
    "adjust_lr_fn": "How the learning rate depends on the shape (muon).  [default: original]",
    "beta2_decay": "Power of the decay of the second moment (adafactor).",
    "eps1": "Least root of the second moment (adafactor).  [default: spacing of the dtype at 1]",
    "eps2": "Least size of the weights, which a step is in proportion to (adafactor).",
    "clipping_threshold": "Size from which an update is clipped (adafactor).",
    "alpha": "Decay rate of the mean of squared gradients (rmsprop), or power of the decay of the "
    "learning rate (asgd).",
    "centered": "Divide by the standard deviation (rmsprop).",
    "rho": "Decay rate of the means (adadelta).",
    "lr_decay": "Decay of the learning rate (adagrad).",
    "momentum_decay": "How fast the momentum grows (nadam).",
    "lambd": "Decay term (asgd).",
    "t0": "Step from which weights are averaged (asgd).",
    "etaminus": "Factor of step sizes where the gradient's sign changed (rprop).",
    "etaplus": "Factor of step sizes where it did not (rprop).",
    "step_size_min": "Least step size (rprop).",
    "step_size_max": "Largest step size (rprop).",
    "dtype": "Dtype of parameters, gradients and optimizer states, and so of the record.",
    "compute_dtype": "Dtype of forward and backward. auto: float32 for a bfloat16 model on a CPU "
    "without fast bfloat16, else --dtype.",
    "loss_chunk": "Positions whose logits are held at once; 0: all, as in the original notebook.",
    "device": "Where to train: cuda, mps or cpu.  [default: the best one available]",
    "seed": "Seed of initialisation and shuffling.",
    "vocab_size": "Tokens in the vocabulary.",
    "hidden_dim": "Dimensions of the embedding.",
    "layers": "Transformer layers.",
    "heads": "Attention heads.",
    "init_scale": "Standard deviation of the embedding at the start.",
    "optimizer_impl": "Which of torch's implementations of the optimizer runs.",
    "double_shift": "Train on the token after next, as the original notebook did by mistake.",
    "corpus": "Text file to train on (UTF-8).  [default: the Python standard library's docs]",
    "tokenizer": "Tokenizer (tokenizers JSON).  [default: a BPE of the standard library]",
    "token_mask": "Safetensors with live_mask or dead_mask.  [default: from the corpus]",
    "every": "Record every N-th step only, and the row before it.",
    "windows": "Record spans of steps only, FIRST:LAST, such as 1:100,900:1000. Adds to --every.",
    "variables": "Record only some of W, grad and the optimizer's states, such as W,grad,exp_avg.  "
    "[default: all]",
    "record_tokens": "Record only live tokens (they occur in the corpus) or only dead ones.",
    "coding": "plain: every array as it is. predicted: the same bits on a third of the disk, for "
    "this package's readers.",
}
"""What each setting means, for the command line and the reader."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of a run; the defaults are those of the original Thimble 1 notebook.

    Two defaults differ from it, because it is slow without them: `compute_dtype="bfloat16"` and
    `loss_chunk=0` are the notebook's arithmetic. Settings of the optimizer that are None are its
    own defaults (`optimizer_settings`). Each field is an option of `thimble-zarr train`
    (`batch_size` is `--batch-size`) and a key of the TOML file that `--config` names. `HELP` says
    what each means. Raises ConfigError if a value cannot work.
    """

    steps: int = 1000
    batch_size: int = 128
    seq_len: int = 128
    optimizer: str = "adamw"
    lr: float | None = None
    weight_decay: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    amsgrad: bool | None = None
    momentum: float | None = None
    dampening: float | None = None
    nesterov: bool | None = None
    ns_steps: int | None = None
    adjust_lr_fn: str | None = None
    beta2_decay: float | None = None
    eps1: float | None = None
    eps2: float | None = None
    clipping_threshold: float | None = None
    alpha: float | None = None
    centered: bool | None = None
    rho: float | None = None
    lr_decay: float | None = None
    momentum_decay: float | None = None
    lambd: float | None = None
    t0: float | None = None
    etaminus: float | None = None
    etaplus: float | None = None
    step_size_min: float | None = None
    step_size_max: float | None = None
    dtype: str = "bfloat16"
    compute_dtype: str = AUTO
    loss_chunk: int = 512
    device: str | None = None
    seed: int = 42
    vocab_size: int = 10_000
    hidden_dim: int = 64
    layers: int = 2
    heads: int = 2
    init_scale: float = 0.02
    optimizer_impl: str = "single"
    double_shift: bool = False
    corpus: Path | None = None
    tokenizer: Path | None = None
    token_mask: Path | None = None
    every: int | None = None
    windows: str | None = None
    variables: str | None = None
    record_tokens: str = "all"
    coding: CodingName = "plain"

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "seq_len", "vocab_size", "hidden_dim", "layers", "heads")
        for name in counts:
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("loss_chunk", self.loss_chunk >= 0, "at least 0")
        self._require("init_scale", 0 <= self.init_scale < math.inf, "a number from 0 up")
        self._require("seed", 0 <= self.seed < 2**63, "in [0, 2**63)")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            is_default = value is None and self.__dataclass_fields__[name].default is None
            self._require(name, value in choices or is_default, f"one of {', '.join(choices)}")
        self._require(
            "hidden_dim", self.hidden_dim % self.heads == 0, f"a multiple of heads ({self.heads})"
        )
        self._check_optimizer()
        if self.schedule is not None and not count_rows(self.schedule, self.steps):
            raise ConfigError(
                f"the schedule {self.schedule} includes none of the {self.steps} steps"
            )

    def _check_optimizer(self) -> None:
        """Raise ConfigError if a setting is none of the optimizer's, or cannot work with it."""
        for name in OWN:
            value = getattr(self, name)
            if value is None:
                continue
            if name not in self._choice.defaults:
                raise ConfigError(
                    f"{name} is a setting of {', '.join(owners(name))}, and the optimizer is "
                    f"{self.optimizer}"
                )
            if not isinstance(value, str):
                holds, expected = RANGES.get(name, FROM_0)
                self._require(name, holds(value), expected)
        own = self.optimizer_settings
        is_plain = not own.get("momentum") or own.get("dampening")
        if self.optimizer == "sgd" and own["nesterov"] and is_plain:
            raise ConfigError("nesterov needs a momentum, and no dampening")
        self._check_implementation()

    def _check_implementation(self) -> None:
        """Raise ConfigError unless torch has this implementation, and it does what it should."""
        if self.optimizer_impl not in self._choice.implementations:
            having = [
                name for name, of in OPTIMIZERS.items() if self.optimizer_impl in of.implementations
            ]
            raise ConfigError(
                f"{self.optimizer} has no {self.optimizer_impl} implementation; only "
                f"{', '.join(having)} have"
            )
        if (self.optimizer, self.optimizer_impl, self.dtype) == ("sgd", "fused", "bfloat16"):
            raise ConfigError(
                "torch's fused SGD skips elements in bfloat16 (pytorch#191763); use --dtype float32"
            )

    @property
    def _choice(self) -> Choice:
        return OPTIMIZERS[self.optimizer]

    @property
    def optimizer_settings(self) -> dict[str, Setting]:
        """The settings that the optimizer has: as they were given, else its defaults."""
        defaults = self._choice.defaults
        given = {name: getattr(self, name) for name in defaults}
        return {**defaults, **{name: of for name, of in given.items() if of is not None}}

    @property
    def optimizer_options(self) -> dict[str, object]:
        """What the optimizer's class is made with, besides the parameters."""
        return self._choice.options(self.optimizer_settings, self.optimizer_impl)

    @property
    def schedule(self) -> Schedule | None:
        """Which steps are recorded: those of `every` and those of `windows`; None is all."""
        chosen = [] if self.every is None else [every(self.every)]
        if self.windows is not None:
            try:
                pairs = [text.split(":") for text in self.windows.split(",")]
                spans = [(int(first), int(last)) for first, last in pairs]
            except ValueError:
                raise ConfigError(
                    f"windows is {self.windows!r}, but must be spans such as 1:100,900:1000"
                ) from None
            chosen.append(windows(*spans))
        return functools.reduce(operator.or_, chosen) if chosen else None

    @property
    def recorded_variables(self) -> tuple[str, ...] | None:
        """Which variables are recorded; None is all."""
        if self.variables is None:
            return None
        return tuple(name.strip() for name in self.variables.split(","))

    def _require(self, name: str, holds: bool, expected: str) -> None:  # noqa: FBT001
        if not holds:
            raise ConfigError(f"{name} is {getattr(self, name)!r}, but must be {expected}")

    @classmethod
    def from_settings(cls, settings: Mapping[str, object]) -> Self:
        """Make a config from settings by name, as `to_json` returns them; the rest are defaults.

        Raises ConfigError if a name is unknown, or a value has the wrong type or cannot work.
        """
        types = {known.name: known.type for known in fields(cls)}
        for name in sorted(settings.keys() - types, key=str):
            raise ConfigError(f"unknown setting {name!r}; the settings are {', '.join(types)}")
        return cls(**{name: _convert(name, types[name], settings[name]) for name in settings})

    def to_json(self) -> dict[str, int | float | str | bool | None]:
        """Return the settings as the store keeps them, with what was not given filled in."""
        values = (asdict(self) | self.optimizer_settings).items()
        return {name: str(value) if isinstance(value, Path) else value for name, value in values}


def read_toml(file: Path) -> dict[str, object]:
    """Read settings from a TOML file, one key a setting; raise ConfigError if that fails."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read settings from {file}: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read settings from {file}: {error}") from error


def _convert(name: str, kind: Any, value: object) -> Any:
    """Check a value from a file against the field's type; make numbers and paths of it."""
    import msgspec  # not for `--help`: it takes 30 ms

    try:
        return msgspec.convert(value, kind, dec_hook=lambda path, text: path(text))
    except msgspec.ValidationError:
        plain = (get_args(kind) or [kind])[0]  # of `int | None` the first
        words: dict[object, str] = {int: "a whole number", float: "a number", bool: "true or false"}
        expected = words.get(plain, "a string")
        raise ConfigError(f"{name} is {value!r}, but must be {expected}") from None
