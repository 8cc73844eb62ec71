"""The group that the commands belong to: exit codes, and errors in one line."""

from __future__ import annotations

import errno
import os
import signal
import sys
import warnings
from typing import Any

import click

from deepfere import __version__
from deepfere.errors import DeepfereError, InputError, SectionFailures
from deepfere.stopping import Stopped


class _Commands(click.Group):
    """Errors in one line: exit 2 where the input is wrong, 1 where something failed."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            super().main(*args, **kwargs)
        except click.exceptions.Exit as stop:
            sys.exit(stop.exit_code)
        except click.Abort as error:
            _stopped(error.__context__)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        except click.UsageError as error:
            click.echo(f"error: {_told(error)} (see {_program(error.ctx)} --help)", err=True)
            sys.exit(2)
        except InputError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except SectionFailures as error:
            for (_, _, one), line in zip(error.found, error.lines, strict=True):
                click.echo(f"{'error' if isinstance(one, InputError) else 'failed'}: {line}", err=True)
            click.echo(f"{error.summary}; the same command again goes on", err=True)
            sys.exit(2 if error.all_input else 1)
        except DeepfereError as error:
            click.echo(f"failed: {' '.join(str(error).split())}; the same command again resumes", err=True)
            sys.exit(1)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            click.echo(f"error: {str(error.filename)[:60]}...: the name is too long; check the path", err=True)
            sys.exit(2)
        except KeyboardInterrupt as error:
            _stopped(error)
        sys.exit(0)


def _told(error: click.UsageError) -> str:
    """One line, where click writes a list of choices below one another."""
    return " ".join(error.format_message().split())


def _program(context: click.Context | None) -> str:
    return context.command_path if context else "deepfere"


def _stopped(error: BaseException | None) -> None:
    again = "the same command without --overwrite" if "--overwrite" in sys.argv else "the same command again"
    why = f" ({error})" if isinstance(error, Stopped) else ""
    click.echo(f"\nstopped{why}; {again} resumes", err=True)
    # What is still put away at exit is no longer to be unwound: another signal ends it there and then.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    sys.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="deepfere")
def main() -> None:
    """Fuse a stained slide with a mass spectrometry image: every ion, at high resolution.

    \b
    Example:
      deepfere fuse sample.imzML slide.svs -o result.zarr --factor 8
      deepfere report result.zarr
    """
    # A terminated job should unwind (and leave work that resumes) exactly like an interrupted one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
