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
from thimble_zarr.format.coding import CodingName
from thimble_zarr.record.schedule import Schedule, count_rows, every, windows

AUTO = "auto"
"""The compute dtype that the machine decides."""

OPTIMIZERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "adadelta": ("Adadelta", ("rho", "eps", "weight_decay")),
    "adafactor": (
        "Adafactor",
        ("beta2_decay", "eps1", "eps2", "clipping_threshold", "weight_decay"),
    ),
    "adagrad": ("Adagrad", ("lr_decay", "eps", "weight_decay")),
    "adam": ("Adam", ("beta1", "beta2", "eps", "weight_decay", "amsgrad")),
    "adamax": ("Adamax", ("beta1", "beta2", "eps", "weight_decay")),
    "adamw": ("AdamW", ("beta1", "beta2", "eps", "weight_decay", "amsgrad")),
    "asgd": ("ASGD", ("lambd", "alpha", "t0", "weight_decay")),
    "muon": (
        "Muon",
        ("momentum", "nesterov", "eps", "ns_steps", "adjust_lr_fn", "weight_decay"),
    ),
    "nadam": ("NAdam", ("beta1", "beta2", "eps", "momentum_decay", "weight_decay")),
    "radam": ("RAdam", ("beta1", "beta2", "eps", "weight_decay")),
    "rmsprop": ("RMSprop", ("alpha", "eps", "momentum", "weight_decay", "centered")),
    "rprop": ("Rprop", ("etaminus", "etaplus", "step_size_min", "step_size_max")),
    "sgd": ("SGD", ("momentum", "dampening", "weight_decay", "nesterov")),
}
"""The class of each optimizer in `torch.optim`, and which settings are its own."""

_PAIRS = {
    "betas": ("beta1", "beta2"),
    "eps": ("eps1", "eps2"),
    "etas": ("etaminus", "etaplus"),
    "step_sizes": ("step_size_min", "step_size_max"),
}
"""What torch takes two settings as."""

_TORCHS = {"clipping_threshold": "d"}
"""What torch calls a setting otherwise."""

_FUSED = ("adagrad", "adam", "adamw", "sgd")

_SINGLE = ("muon",)
"""Those that have no other implementation."""

OF_MATRICES = ("muon",)
"""Those that take matrices only. AdamW takes the other parameters, with the same learning rate."""

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
    "weight_decay": "Weight decay: decoupled in AdamW, added to the gradient in others.",
    "beta1": "Decay rate of the first moment.",
    "beta2": "Decay rate of the second moment.",
    "eps": "Added to the optimizer's denominator.",
    "amsgrad": "Divide by the largest second moment so far (adam, adamw).",
    "momentum": "Factor of the momentum buffer (sgd, rmsprop, muon).  [default: torch's, 0.95 of "
    "muon, else 0]",
    "dampening": "Dampening of the gradient in the buffer (sgd).",
    "nesterov": "Nesterov's momentum (sgd, muon).  [default: torch's, only muon]",
    "ns_steps": "Newton-Schulz iterations (muon).",
    "adjust_lr_fn": "How the learning rate depends on the shape (muon).  [default: original]",
    "beta2_decay": "Power of the decay of the second moment (adafactor).",
    "eps1": "Least root of the second moment (adafactor).  [default: spacing of the dtype at 1]",
    "eps2": "Least size of the weights, which a step is in proportion to (adafactor).",
    "clipping_threshold": "Size from which an update is clipped (adafactor).",
    "alpha": "Decay rate of the mean of squared gradients (rmsprop), or power of the decay of the "
    "learning rate (asgd).  [default: torch's, 0.99 or 0.75]",
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
    "variables": "Record only some of W, grad, exp_avg, exp_avg_sq.  [default: all]",
    "record_tokens": "Record only live tokens (they occur in the corpus) or only dead ones.",
    "coding": "plain: every array as it is. predicted: the same bits on a third of the disk, for "
    "this package's readers.",
}
"""What each setting means, for the command line and the reader."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings of a run; the defaults are those of the original Thimble 1 notebook.

    Two defaults differ from it, because it is slow without them: `compute_dtype="bfloat16"` and
    `loss_chunk=0` are the notebook's arithmetic. Each field is an option of `thimble-zarr train`
    (`batch_size` is `--batch-size`) and a key of the TOML file that `--config` names. `HELP` says
    what each means. Raises ConfigError if a value cannot work.
    """

    steps: int = 1000
    batch_size: int = 128
    seq_len: int = 128
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    amsgrad: bool = False
    momentum: float | None = None
    dampening: float = 0.0
    nesterov: bool | None = None
    ns_steps: int = 5
    adjust_lr_fn: str | None = None
    beta2_decay: float = -0.8
    eps1: float | None = None
    eps2: float = 1e-3
    clipping_threshold: float = 1.0
    alpha: float | None = None
    centered: bool = False
    rho: float = 0.9
    lr_decay: float = 0.0
    momentum_decay: float = 0.004
    lambd: float = 1e-4
    t0: float = 1e6
    etaminus: float = 0.5
    etaplus: float = 1.2
    step_size_min: float = 1e-6
    step_size_max: float = 50.0
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
        for name in ("lr", "weight_decay", "eps", "init_scale"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a number from 0 up")
        self._require("seed", 0 <= self.seed < 2**63, "in [0, 2**63)")
        for name in ("beta1", "beta2"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
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
        own = OPTIMIZERS[self.optimizer][1]
        for setting in fields(self):
            name, whose = (
                setting.name,
                [of for of, (_, its) in OPTIMIZERS.items() if setting.name in its],
            )
            value = getattr(self, name)
            is_unset = value == setting.default or (setting.default is None and not value)
            if whose and name not in own and not is_unset:
                raise ConfigError(
                    f"{name} is a setting of {', '.join(whose)}, and the optimizer is "
                    f"{self.optimizer}"
                )
        for name in own:
            value = getattr(self, name)
            if value is None or isinstance(value, str):
                continue
            if name == "beta2_decay":
                self._require(name, -math.inf < value <= 0, "a number up to 0")
            else:
                self._require(name, 0 <= value < math.inf, "a number from 0 up")
        self._require("ns_steps", 1 <= self.ns_steps < 100, "from 1 to 99")
        self._require("clipping_threshold", self.clipping_threshold >= 1, "at least 1")
        self._check_implementation()
        if self.optimizer == "sgd" and self.nesterov and (not self.momentum or self.dampening != 0):
            raise ConfigError("nesterov needs a momentum, and no dampening")
        self._require("rho", self.rho <= 1, "at most 1")
        self._require("etaminus", 0 < self.etaminus < 1, "between 0 and 1")
        self._require("etaplus", self.etaplus > 1, "more than 1")

    def _check_implementation(self) -> None:
        """Raise ConfigError unless torch has this implementation, and it does what it should."""
        if self.optimizer in _SINGLE and self.optimizer_impl != "single":
            raise ConfigError(f"{self.optimizer} has no {self.optimizer_impl} implementation")
        is_fused = self.optimizer_impl == "fused"
        if is_fused and self.optimizer not in _FUSED:
            raise ConfigError(
                f"{self.optimizer} has no fused implementation; only {', '.join(_FUSED)} have"
            )
        if is_fused and self.optimizer == "sgd" and self.dtype == "bfloat16":
            raise ConfigError(
                "torch's fused SGD skips elements in bfloat16 (pytorch#191763); use --dtype float32"
            )

    @property
    def optimizer_options(self) -> dict[str, object]:
        """What the optimizer's class is made with, besides the parameters."""
        own = {name: getattr(self, name) for name in OPTIMIZERS[self.optimizer][1]}
        options: dict[str, object] = {"lr": self.lr}
        for pair, names in _PAIRS.items():
            if names[0] in own:
                options[pair] = tuple(own.pop(name) for name in names)
        known = {name: value for name, value in own.items() if value is not None}
        options |= {_TORCHS.get(name, name): value for name, value in known.items()}
        if self.optimizer not in _SINGLE:
            options["foreach"] = self.optimizer_impl == "foreach"
        if self.optimizer in _FUSED:
            options["fused"] = self.optimizer_impl == "fused"
        return options

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
        """Return the settings as the store keeps them."""
        values = asdict(self).items()
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
        plain = int if kind == int | None else kind
        words: dict[object, str] = {int: "a whole number", float: "a number", bool: "true or false"}
        expected = words.get(plain, "a string")
        raise ConfigError(f"{name} is {value!r}, but must be {expected}") from None
