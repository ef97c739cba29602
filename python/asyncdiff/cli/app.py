"""The typer application: the commands and what ``--help`` says."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .commands.bench import bench
from .commands.cache import cache
from .commands.calibrate import calibrate
from .commands.demo import demo
from .commands.doctor import doctor
from .commands.generate import generate
from .commands.plan import plan
from .commands.prepare import prepare
from .commands.tune import tune
from .failures import refuse_launchers
from .option_groups import with_groups

app = typer.Typer(
    name="asyncdiff",
    help="Asynchronous denoising of diffusion models over several GPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # main() tells users' mistakes from faults
    rich_markup_mode="rich",
)
for function in (demo, generate, prepare, plan, tune, calibrate, doctor):
    app.command()(with_groups(function))
app.add_typer(bench)
app.add_typer(cache)


def command() -> Any:
    """The application as a command that can be called."""
    return typer.main.get_command(app)


def _version(wanted: bool) -> None:
    if wanted:
        from ..tools.doctor import version

        typer.echo(f"asyncdiff {version('asyncdiff') or 'not installed'}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    if context.invoked_subcommand not in ("plan", "doctor", "generate", "prepare"):
        refuse_launchers()
