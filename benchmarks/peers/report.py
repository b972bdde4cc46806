"""The measured numbers as Markdown and as a plot: pure functions of `peers.json`."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.inputs import SMALL

OURS = "thimble-zarr"

Results = dict[str, Any]

LARGER = "larger"
"""Where the numbers are of what was read of a run that is larger than the memory."""

MEASURES = {"wall_s": "time", "peak_rss_bytes": "peak RSS", "bytes_read": "bytes read"}

WHAT_IS_COUNTED = """\
## What is counted

- Every process is measured whole, from `exec` to exit, start-up and imports included; the peers
  take turns, and before each its files are brought into the page cache. Medians.
- *time* is elapsed time. *Peak RSS* is the kernel's `ru_maxrss`; it has in it the pages of mapped
  files (memmap; safetensors maps, too), which the kernel could take back. thimble-zarr's checks
  fork a process a core: theirs is the sum of all, among which what they share is divided (PSS).
- *bytes read* is `rchar` of `/proc/PID/io` when the process has ended: all it read by calls, the
  modules of Python too (up to 30 MB). No call reads a mapped file: for memmap and the notebook the
  pages are added that the task must touch, computed from its indices.
- memmap, h5py and tensorstore share one hand-written pass (`by_hand.py`): fused, float32, buffers
  that fit the cache, a thread a core. memmap has raw files, so nothing is decompressed and nothing
  has a checksum: the floor. zarr + dask and tensorstore read thimble-zarr's own store.
- Every peer's answer is compared with thimble-zarr's: tables step by step (cosines absolute, norms
  and ratios relative), counts, the rest by its sums (relative). The notebook subtracts in bfloat16;
  the others compute in float32, and `adam_residual` of thimble-zarr in float64. Its checks do more
  than is asked: the formula check bounds rounding element by element; the exact check
  (`check --no-formula`) looks for values that were stored anew. Unless told otherwise `check` does
  both, reading once; the others would take the sum of theirs.
- Recording: the first gradients of the real run in turn, AdamW on the embedding, then sleep until a
  step has lasted 15 ms. *Busy* is the optimizer's step and the recording of it. Only thimble-zarr
  flushes to the disk itself (`fsync`), keeps checksums of what it wrote, and leaves a store that is
  whole after a crash at any moment.
"""


WHY = """\
Why not first:

- memmap is the floor: raw files of 5.1 GB, twice as large as the store, no checksum and nothing to
  decode, and a process that imports NumPy alone. Of what thimble-zarr's formula check computes,
  reading, checking and decoding chunks is two fifths, and the bound on the rounding of every
  element, which nobody else has, an eighth.
- In the exact check two thirds of a second pass while torch is imported and one core waits. Of what
  is computed then, reading, checking and decoding chunks is three fifths, torch's own program a
  quarter.
- Of one token, or one step, half a second is start-up: xarray, pandas and Dask are imported before
  there is a dataset. The table of what is opened and read has it without.
- Chunks of 128 KiB serve those who read a few tokens. Readers that wait for an event loop at every
  chunk, as Zarr for Python does, are slow with them.
"""


def seconds(value: float) -> str:
    return (
        f"{value * 1e3:.3g} ms"
        if value < 1
        else f"{value:.3g} s"
        if value < 100
        else f"{value:.0f} s"
    )


def size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.3g} MB"


def show(key: str, value: float) -> str:
    return seconds(value) if key.endswith("_s") else size(value)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def cells(
    peers: Iterable[str], by_peer: Mapping[str, Mapping[str, float]], keys: Iterable[str]
) -> Iterator[str]:
    """Yield a cell for each peer, the fastest one's time bold."""
    first, *rest = keys
    best = min(found[first] for found in by_peer.values())
    for peer in peers:
        if peer not in by_peer:
            yield "minutes" if len(by_peer) > 1 else "-"
            continue
        found = by_peer[peer]
        bold = "**" if found[first] == best and len(by_peer) > 1 else ""
        yield ", ".join(
            [f"{bold}{show(first, found[first])}{bold}"] + [show(k, found[k]) for k in rest]
        )


def not_first(reading: Results, tasks: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each measure: where thimble-zarr is not first, and who is."""
    for key, name in MEASURES.items():
        behind = []
        for task, by_peer in reading.items():
            best = min(by_peer, key=lambda peer: by_peer[peer][key])
            if by_peer[best][key] < by_peer[OURS][key]:
                factor = by_peer[OURS][key] / by_peer[best][key]
                behind.append(f"{tasks[task]} ({best}, {factor:.1f} times)")
        where = "; ".join(behind) if behind else "nothing"
        yield f"- In {name} thimble-zarr is not first in: {where}."


def agreement(reading: Results, tasks: Mapping[str, str]) -> str:
    """Return how far the peers' answers are from ours."""
    largest = []
    for task, by_peer in reading.items():
        if len(by_peer) == 1:  # it is ours
            continue
        peer = max(by_peer, key=lambda peer: by_peer[peer]["difference"])
        differs = by_peer[peer]["difference"]
        largest.append(f"{tasks[task]} {differs:.0e} ({peer})" if differs else f"{tasks[task]} 0")
    return f"Largest difference from thimble-zarr's answers: {', '.join(largest)}."


def cold(results: Results) -> list[str]:
    """Return the section of what was read from the disk, if that was measured."""
    if "cold" not in results:
        return []
    return [
        "## Reading from the disk: whole processes, nothing in the page cache",
        "As when the data are larger than memory: before each process its files are dropped from "
        f"the page cache (`posix_fadvise`). Medians of {turns(results['cold'])}. Time, peak RSS; "
        "the shortest time is bold.",
        summary(results, "cold"),
        next(not_first(results["cold"], results["tasks"])),
    ]


def larger(results: Results) -> list[str]:
    """Return the section of what is larger than the memory, if that was measured."""
    if LARGER not in results:
        return []
    found = results[LARGER]
    about, disk = found["about"], found["disk"]
    return [
        "## Reading what is larger than the memory",
        f"{about['steps']:,} steps of {about['n_tokens']:,} x {about['n_dims']}: "
        f"{size(disk['memmap'])} of raw numbers, where there are "
        f"{size(about['machine']['memory_bytes'])} of memory. The notebook's arrays, 1.5 times as "
        "large, do not fit; h5py and zarr + dask, several times slower above, are left out. "
        "Nothing is in the page cache at first. Time, peak RSS; the shortest time is bold. Medians "
        f"of {turns(found['reading'])}; {about['date']}, commit {about['commit']}.",
        summary(found),
        next(not_first(found["reading"], found["tasks"])),
    ]


def markdown(results: Results) -> str:
    """Return `RESULTS.md`."""
    about, tasks, reading = results["about"], results["tasks"], results["reading"]
    recording, host = results["recording"], results["about"]["machine"]
    peers = list(results["disk"])
    kept = {"busy_median_s": "a step, busy, median", "busy_worst_s": "a step, busy, worst"}
    kept |= {"total_s": "all steps, closing included", "peak_rss_bytes": "peak RSS"}
    kept |= {"disk_bytes": "on disk"}
    parts = [
        "# Beside other tools",
        f"The same recorded run, {about['steps']:,} steps of {about['n_tokens']:,} x "
        f"{about['n_dims']} in bfloat16 ({about['n_dead']:,} dead tokens), read by other tools and "
        f"by thimble-zarr; {medians(results)}. {host['platform']}, {host['cores']} cores, "
        f"{size(host['memory_bytes'])} of memory, Python {host['python']}; {about['date']}, "
        f"commit {about['commit']}. `python -m benchmarks.peers` wrote this file; raw numbers: "
        "[peers.json](peers.json).",
        "![Time against peak memory](RESULTS.png)",
        "## Reading: whole processes",
        "Time, peak RSS, bytes read; the shortest time is bold.",
        table(
            ["", *peers],
            [[tasks[task], *cells(peers, by_peer, MEASURES)] for task, by_peer in reading.items()]
            + [["on disk, all four variables", *(size(results["disk"][peer]) for peer in peers)]],
        ),
        "\n".join(not_first(reading, tasks)),
        WHY.strip(),
        agreement(reading, tasks),
        *cold(results),
        *larger(results),
        "## Reading: opened and read, after imports",
        "Time, bytes read.",
        table(
            ["", *peers],
            [
                [tasks[task], *cells(peers, reading[task], ("process_s", "process_bytes_read"))]
                for task in SMALL
            ],
        ),
        f"## Recording: {about['recording_steps']} steps, medians of {recording[OURS]['n']:.0f}",
        *([about["note_on_recording"]] if "note_on_recording" in about else []),
        table(
            ["", *recording],
            [
                [title, *(show(key, found[key]) for found in recording.values())]
                for key, title in kept.items()
            ],
        ),
        WHAT_IS_COUNTED.strip(),
        "## How to measure again",
        "`make bench` measures everything, this too; alone, with a recorded run in `runs/bench`:",
        "```console\n$ .venv/bin/python -m benchmarks.peers --repeats 5\n```",
        "and what is larger than the memory with a longer run, and room for its raw numbers:",
        "```console\n"
        "$ .venv/bin/python -m benchmarks.run runs/long/run.zarr "
        "--steps 5000 --batch-size 2 --early 200\n"
        "$ .venv/bin/python -m benchmarks.peers.larger\n```",
    ]
    return "\n\n".join(parts) + "\n"


def turns(reading: Results) -> int:
    """Return how often was measured."""
    return max(int(found["n"]) for by_peer in reading.values() for found in by_peer.values())


def medians(results: Results) -> str:
    """Return how often was measured, and what less often, if anything was."""
    repeats, reading = results["about"]["repeats"], results["reading"]
    seldom = {peer for found in reading.values() for peer in found if found[peer]["n"] < repeats}
    but = f"; {' and '.join(sorted(seldom))}, where it takes minutes, once" if seldom else ""
    return f"medians of {repeats}{but}"


def summary(results: Results, measured: str = "reading") -> str:
    """Return time and peak memory of whole processes: the table of the docs."""
    tasks, reading = results["tasks"], results[measured]
    peers = list(results["disk"])
    return table(
        ["", *peers],
        [
            [tasks[task], *cells(peers, by_peer, ("wall_s", "peak_rss_bytes"))]
            for task, by_peer in reading.items()
        ],
    )


COLOURS = ("#999999", "#E69F00", "#56B4E9", "#CC79A7", "#0072B2", "#D55E00")  # Okabe and Ito
MARKERS = ("o", "s", "D", "X", "^", "v", "P")


def plot(results: Results, file: Path) -> None:
    """Draw time against peak memory: a colour a peer, a shape a task; down and left is good."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullLocator

    reading = results["reading"]
    peers = list(results["disk"])
    colours = dict(zip(peers, COLOURS, strict=True))
    markers = dict(zip(reading, MARKERS, strict=True))
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for task, by_peer in reading.items():
        for peer, found in by_peer.items():
            axes.plot(
                found["wall_s"],
                found["peak_rss_bytes"] / 1e6,
                markers[task],
                color=colours[peer],
                markersize=9 if peer == OURS else 7,
                markeredgecolor="black" if peer == OURS else "white",
                zorder=3 if peer == OURS else 2,
            )
    axes.set(xscale="log", yscale="log", xlabel="time (s)", ylabel="peak RSS (MB)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:,g}")
    axes.grid(visible=True, color="#eeeeee")
    axes.spines[["top", "right"]].set_visible(False)

    def handle(label: str, marker: str, colour: str) -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, color=colour, markersize=7, label=label)

    of_peers = axes.legend(
        handles=[handle(peer, "o", colour) for peer, colour in colours.items()],
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        frameon=False,
    )
    axes.add_artist(of_peers)
    axes.legend(
        handles=[handle(task, marker, "#444444") for task, marker in markers.items()],
        loc="lower left",
        bbox_to_anchor=(1.01, 0),
        frameon=False,
    )
    figure.savefig(file, dpi=150)
    plt.close(figure)
