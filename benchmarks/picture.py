"""Photograph a report for the README: its verdict, and the panels that tell most.

`thimble-zarr report runs/full.zarr -o full.html`, then `python -m benchmarks.picture full.html`.
"""

from pathlib import Path

import click

MOST_BYTES = 200_000

PANELS = ("regimes", "token_image")

_OTHERS = f".panel:not({', '.join(f'#{name}' for name in PANELS)})"
HIDDEN = f"nav, footer, code, header dl, {_OTHERS} {{ display: none !important }}"


@click.command()
@click.argument("report", type=click.Path(path_type=Path, exists=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("docs/report.png"))
@click.option("--width", default=1000, show_default=True, help="Of the page, in CSS pixels.")
@click.option("--scale", default=1.5, show_default=True, help="Pixels of one CSS pixel.")
def main(report: Path, output: Path, width: int, scale: float) -> None:
    """Write a picture of REPORT, an HTML file, of at most 200 kB."""
    from PIL.Image import Dither, Quantize

    from tests.support import browser as browsers

    path = browsers.found()
    if path is None:
        raise click.ClickException(f"PATH has no browser: none of {', '.join(browsers.NAMES)}")
    with browsers.launched(path) as browser:
        page = browser.new_page(viewport={"width": width, "height": 800}, device_scale_factor=scale)
        page.goto(report.absolute().as_uri())
        page.add_style_tag(content=HIDDEN)
        page.wait_for_function(browsers.DRAWN)
        image = browsers.as_image(page.screenshot(full_page=True))
    output.parent.mkdir(parents=True, exist_ok=True)
    for n_colors in (256, 128, 64, 32, 16):
        small = image.quantize(n_colors, Quantize.MAXCOVERAGE, dither=Dither.NONE)
        small.save(output, optimize=True)
        if output.stat().st_size <= MOST_BYTES:
            click.echo(f"{output}: {image.width} x {image.height}, {output.stat().st_size:,} bytes")
            return
    raise click.ClickException(f"{output} is larger than {MOST_BYTES:,} bytes; lower --scale")


if __name__ == "__main__":
    main()
