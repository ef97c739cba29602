"""The typer application: the commands and what ``--help`` says."""

from __future__ import annotations

from typing import Annotated

import typer

from .bench import bench
from .calibrate import calibrate
from .demo import demo
from .doctor import doctor
from .generate import generate
from .plan import plan
from .tune import tune

app = typer.Typer(
    name="asyncdiff",
    help="Asynchronous denoising of diffusion models over several GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # main() tells users' mistakes from faults
    rich_markup_mode="rich",
)
app.command()(demo)
app.command()(generate)
app.command()(plan)
app.command()(tune)
app.command()(calibrate)
app.command()(doctor)
app.add_typer(bench)


def _version(wanted: bool) -> None:
    if wanted:
        from ..tools.doctor import version

        typer.echo(f"asyncdiff {version('asyncdiff') or 'not installed'}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass
