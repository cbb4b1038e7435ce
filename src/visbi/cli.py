"""The command `visbi`."""

import os
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Variational inference for simulation-based inference."
)


@app.callback()
def main() -> None:
    """Variational inference for simulation-based inference."""


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for the posterior, its certificate and the pictures.")
    ] = Path("demo-output"),
    quick: Annotated[
        bool, typer.Option(help="Fewer simulations and shorter fits, for a first look.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that simulate.")] = 2,
) -> None:
    """Lynx and hare of the Hudson Bay: from simulations to a certified posterior."""
    import torch

    from visbi.demo import FULL, QUICK, run_demo

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # the networks are small: a second thread costs more than it does
    run_demo(output, effort=QUICK if quick else FULL, seed=seed, workers=workers, say=typer.echo)


if __name__ == "__main__":
    app()
