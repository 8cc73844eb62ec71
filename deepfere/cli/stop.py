"""``deepfere stop``: have a run save its work and stop."""

from __future__ import annotations

import click

from deepfere.cli.root import main


@main.command()
@click.argument("run")
@click.option("--no-wait", is_flag=True, help="Ask it to stop and return; else until it has stopped.")
def stop(run: str, no_wait: bool) -> None:
    """Have a run save its work and stop; the command that started it resumes.

    RUN is a study's working folder, the result that a fuse is to write, or the id that submit has told. Training saves
    a checkpoint, reconstruction finishes the shards that it has begun, other stages stop where they are.

    \b
    Example:
      deepfere stop work
      deepfere stop deepfere-train-0123456789ab
    """
    from deepfere.submit.stop import ask, wait

    asked = ask(run)
    click.echo(asked.told)
    if asked.running and not no_wait:
        wait(asked)
        click.echo("stopped")
