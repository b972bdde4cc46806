"""Files of every layout that is read, written by the libraries that the notebooks wrote them with.

All are of one run of AdamW in bfloat16, whose rows are kept by hand.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from safetensors.torch import save_file

from tests.support.runs import Loop, live_mask

N_TOKENS, N_DIMS, N_STEPS, N_LIVE = 40, 8, 12, 27

VARIABLES = ("W", "grad", "exp_avg", "exp_avg_sq")

SETTINGS = {
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
}


@dataclass(frozen=True)
class Trajectory:
    """What a run did: each variable of all tokens, shape `(step, token, dim)`, and its losses."""

    tensors: Mapping[str, torch.Tensor]
    losses: list[float]

    @property
    def live(self) -> np.ndarray:
        return live_mask(N_TOKENS, N_LIVE)

    @property
    def dead_ids(self) -> np.ndarray:
        return np.flatnonzero(~self.live)


def trajectory(
    n_steps: int = N_STEPS, lr: Callable[[int], float] = lambda step: 1e-2, seed: int = 0
) -> Trajectory:
    """Train a model and keep every row; `lr` is the learning rate of each step."""
    loop = Loop(n_tokens=N_TOKENS, n_dims=N_DIMS, n_live=N_LIVE, weight_decay=0.1)
    torch.manual_seed(seed)
    W, zero = loop.weight, torch.zeros_like(loop.weight)
    rows = {name: [zero] for name in VARIABLES} | {"W": [W.detach().clone()]}
    losses = []
    for step in range(1, n_steps + 1):
        loop.optimizer.param_groups[0]["lr"] = lr(step)
        losses.append(loop.step())
        state = loop.optimizer.state[W]
        now = {"W": W, "grad": W.grad, "exp_avg": state["exp_avg"]}
        for name, tensor in (now | {"exp_avg_sq": state["exp_avg_sq"]}).items():
            rows[name].append(tensor.detach().clone())
        loop.optimizer.zero_grad()
    return Trajectory({name: torch.stack(of) for name, of in rows.items()}, losses)


def scalars() -> dict[str, torch.Tensor]:
    """Return the hyper-parameters as the first notebook saves them."""
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in SETTINGS.items()}


def masks(run: Trajectory) -> dict[str, torch.Tensor]:
    live = torch.from_numpy(run.live)
    ids = {"live_ids": live.nonzero().flatten(), "dead_ids": (~live).nonzero().flatten()}
    return {"live_mask": live, "dead_mask": ~live, **ids}


def _save(file: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    save_file({name: of.contiguous() for name, of in tensors.items()}, file)
    return file


def _named(run: Trajectory, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Return the variables under the first notebook's names, moments in float32."""
    W, grad, m, v = (run.tensors[name] for name in VARIABLES)
    moments = (m, v) if dtype is None else (m.to(dtype), v.to(dtype))
    return dict(zip(("W", "grad_W", "momentum_W", "variance_W"), (W, grad, *moments), strict=True))


def _losses(run: Trajectory, first: float | None = np.nan) -> torch.Tensor:
    return torch.tensor([*([] if first is None else [first]), *run.losses], dtype=torch.float32)


def thimble_5(run: Trajectory, folder: Path) -> Path:
    tensors = _named(run, torch.float32) | {"losses": _losses(run)} | scalars() | masks(run)
    return _save(folder / "thimble_5.safetensors", tensors)


def flannel(runs: tuple[Trajectory, ...], folder: Path) -> Path:
    named = [_named(run, torch.float32) for run in runs]
    tensors = {name: torch.stack([of[name] for of in named]) for name in named[0]}
    tensors["losses"] = torch.stack([_losses(run) for run in runs]).bfloat16()
    tensors["W_initial"] = tensors["W"][:, 0]
    return _save(folder / "flannel.safetensors", tensors | scalars())


def _hdf5(file: Path, run: Trajectory, arrays: Mapping[str, np.ndarray], **options: object) -> Path:
    with h5py.File(file, "w") as written:
        for name, array in arrays.items():
            written.create_dataset(name, data=array, **options)
        written["losses"] = _losses(run).numpy()
        written["live_mask"] = run.live
        written["dead_mask"] = ~run.live
        written.attrs.update({name: np.float32(value) for name, value in SETTINGS.items()})
    return file


def thimble_6(run: Trajectory, folder: Path) -> Path:
    arrays = {name: of.half().numpy() for name, of in _named(run).items()}
    chunks = (1, N_TOKENS, N_DIMS)
    return _hdf5(folder / "thimble_6.h5", run, arrays, chunks=chunks, compression="gzip")


def bits(tensor: torch.Tensor) -> np.ndarray:
    """Return the bits of bfloat16 as 16-bit integers."""
    return tensor.contiguous().view(torch.uint16).numpy()


def thimble_7(run: Trajectory, folder: Path, chunk_steps: int = 5) -> Path:
    arrays = {name: bits(of) for name, of in _named(run).items()}
    chunks = (chunk_steps, N_TOKENS, N_DIMS)  # of which the last has room for more rows
    return _hdf5(folder / "thimble_7.h5", run, arrays, chunks=chunks, maxshape=(None, None, None))


def _dead(run: Trajectory, n_states: int | None = None) -> dict[str, torch.Tensor]:
    """Return the dead tokens as Thimble 8 has them, states of the first steps only."""
    W, g, m, v = (run.tensors[name][:, run.dead_ids] for name in VARIABLES)
    states = {"m": m.float()[:n_states], "v": v.float()[:n_states], "g": g.float()[:n_states]}
    dead = torch.from_numpy(~run.live)
    ids = {"dead_mask": dead, "dead_indices": torch.from_numpy(run.dead_ids)}
    return {"W": W.contiguous().view(torch.uint16), **states, "loss": _losses(run, 0.0), **ids}


def _with_metadata(folder: Path, tensors: Mapping[str, torch.Tensor], **settings: object) -> Path:
    folder.mkdir()
    content = {"name": "a run", "hyperparameters": SETTINGS, "vocab_size": N_TOKENS, **settings}
    (folder / "metadata.json").write_text(json.dumps(content))
    return _save(folder / "run.safetensors", tensors)


def thimble_8(run: Trajectory, folder: Path) -> Path:
    return _with_metadata(folder / "thimble_8", _dead(run), device="mps")


def thimble_9(run: Trajectory, folder: Path) -> Path:
    tensors = {name: of for name, of in _dead(run).items() if name not in ("m", "v", "g")}
    return _with_metadata(folder / "thimble_9", tensors)


def hidden_means() -> torch.Tensor:
    """Return a mean for each step, of which no two numbers are the same."""
    return torch.arange(N_STEPS * N_DIMS, dtype=torch.float32).reshape(N_STEPS, N_DIMS) / 3


def crucible(run: Trajectory, folder: Path, n_states: int = 9) -> Path:
    tensors = _dead(run, n_states)
    tensors["g"] = tensors["g"][1:]  # of step k+1
    derived = {"centroid": torch.zeros(N_STEPS + 1, N_DIMS), "h_mean": hidden_means()}
    return _with_metadata(folder / "crucible", tensors | derived)


def movie(run: Trajectory, folder: Path) -> Path:
    dead = torch.from_numpy(~run.live)
    tensors = {"W": run.tensors["W"][:, dead], "losses": _losses(run, None), "dead_mask": dead}
    return _save(folder / "movie.safetensors", tensors)


def box(run: Trajectory, folder: Path) -> Path:
    return _save(folder / "box_1.safetensors", {"embedding_history": run.tensors["W"]})


@dataclass(frozen=True)
class Expected:
    """What a file of a layout must be read as.

    `steps` are those that can be checked to the bit; None where nothing can.
    """

    write: Callable[[Trajectory, Path], Path]
    variables: tuple[str, ...] = VARIABLES
    has_all_tokens: bool = True
    has_labels: bool = True
    has_losses: bool = True
    has_settings: bool = True
    n_states: int = N_STEPS + 1
    dtype: torch.dtype = torch.bfloat16
    device: str = "unknown"


LAYOUTS = {
    "thimble_5": Expected(thimble_5),
    "thimble_6": Expected(thimble_6, dtype=torch.float16),
    "thimble_7": Expected(thimble_7),
    "thimble_8": Expected(thimble_8, has_all_tokens=False, device="mps"),
    "thimble_9": Expected(thimble_9, variables=("W",), has_all_tokens=False),
    "crucible": Expected(crucible, has_all_tokens=False, n_states=9),
    "movie": Expected(movie, variables=("W",), has_all_tokens=False, has_settings=False),
    "box": Expected(box, variables=("W",), has_labels=False, has_losses=False, has_settings=False),
}
"""The layouts of one run each, and what is expected of each."""
