"""Ray job entry point: Fit the sections of a study and train their joint model.

`deepfere submit` does the same and more. With Ray's own client, from a checkout, to a cluster whose nodes share the
study's storage:

    ray job submit --working-dir . -- python jobs/train.py study.yaml -o /shared/work
"""

from __future__ import annotations

import sys

from deepfere.cli import main

if __name__ == "__main__":
    # The stage finds the cluster through RAY_ADDRESS, which Ray sets for its jobs.
    main(["train", *sys.argv[1:]])
