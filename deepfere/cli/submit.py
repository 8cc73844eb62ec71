"""``deepfere submit``: a job on this machine, a Ray cluster, Kubernetes or Slurm, followed to its end."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from deepfere.cli.root import main

JOBS = ("ingest", "align", "tile", "train", "reconstruct", "fuse")
OPTIONS = [
    click.Option(
        ["--to"],
        type=click.Choice(["local", "ray", "kuberay", "slurm"]),
        required=True,
        help="This machine, a Ray cluster that is up, Kubernetes, or Slurm.",
    ),
    click.Option(["--dry-run"], is_flag=True, help="Print exactly what would be sent, and send nothing."),
    click.Option(["--no-wait"], is_flag=True, help="Submit and return; else the job is followed to its end."),
    click.Option(["--address"], help="ray: the dashboard, http://HOST:8265."),
    click.Option(["--image"], help="kuberay: your image of cluster/Dockerfile."),
    click.Option(["--gpu-image"], help="kuberay: your image for GPU nodes."),
    click.Option(["--namespace"], help="kuberay: the namespace [default: kubectl's]."),
    click.Option(
        ["--sbatch"], multiple=True, metavar="OPTION", help="slurm: an option of sbatch, as in --sbatch=--nodes=4."
    ),
    click.Option(["--paths-on-cluster"], is_flag=True, help="ray, kuberay: the files are there and not here."),
]
ONLY = {"address": "ray", "image": "kuberay", "gpu_image": "kuberay", "namespace": "kuberay", "sbatch": "slurm"}


@main.group()
def submit() -> None:
    """Run a job somewhere else: --to local, ray, kuberay or slurm.

    Settings are resolved and checked here, and all of them travel with the job. It is followed to its end, its output
    is printed, and its exit code is the one returned. Ctrl-C leaves it running; twice stops it. The same command again
    attaches to it while it runs, and resumes it afterwards.

    \b
    Example:
      deepfere submit reconstruct study.yaml -o /shared/work --to slurm --sbatch=--nodes=4
      deepfere submit train study.yaml -o /shared/work --to ray --address http://head:8265 --dry-run
    """


def _target(to: str, options: dict[str, Any]) -> Any:
    for name, owner in ONLY.items():
        if options[name] and owner != to:
            raise click.UsageError(f"--{name.replace('_', '-')} is for --to {owner}")
    if to == "local":
        from deepfere.submit.local import Local

        return Local()
    if to == "ray":
        from deepfere.submit.ray_jobs import Ray

        return Ray(options["address"])
    if to == "kuberay":
        from deepfere.submit.kuberay import KubeRay

        return KubeRay(options["image"], options["gpu_image"], options["namespace"])
    from deepfere.submit.slurm import Slurm

    return Slurm(options["sbatch"])


def _run(command: click.Command, values: dict[str, Any]) -> None:
    options = {str(option.name): values.pop(str(option.name)) for option in OPTIONS}
    to = options["to"]
    target = _target(to, options)
    from deepfere.submit.prepare import prepare

    submission = prepare(command, values, to=to, elsewhere=options["paths_on_cluster"])
    if options["dry_run"]:
        from deepfere.training.mlflow_store import redact

        click.echo(redact(target.payload(submission, submission.base)), nl=False)
        return
    from deepfere.submit.records import keep
    from deepfere.submit.target import follow

    job, new = target.submit(submission)
    keep(job, submission)
    _tell(f"{job.name}: {'submitted' if new else 'runs already'}")
    recorded = submission.job in ("train", "reconstruct", "fuse")
    if recorded and to in ("ray", "kuberay") and submission.config.tracking.uri is None:
        _tell("note: the run is recorded in the home of the node that runs it; tracking.uri names a store that stays")
    if options["no_wait"]:
        return
    sys.exit(follow(job, lambda text: click.echo(text, nl=False), _tell, "the same command again", time.sleep))


def _tell(text: str) -> None:
    click.echo(text, err=True)


def _add(command: click.Command) -> None:
    """The command of a job with what every submission takes besides."""

    def callback(**values: Any) -> None:
        _run(command, values)

    head = f"Submit `deepfere {command.name}`: {(command.help or '').partition(chr(10))[0]}"
    words = "MSI SLIDE -o RESULT.zarr" if command.name == "fuse" else "study.yaml -o work"
    example = f"\b\nExample:\n  deepfere submit {command.name} {words} --to local"
    submit.add_command(
        click.Command(command.name, params=[*command.params, *OPTIONS], callback=callback, help=f"{head}\n\n{example}")
    )


for name in JOBS:
    _add(main.commands[name])
