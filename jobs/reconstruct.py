"""Ray job entry point: Write the results of a study.

`deepfere submit` does the same and more. With Ray's own client, from a checkout, to a cluster whose nodes share the
study's storage:

    ray job submit --working-dir . -- python jobs/reconstruct.py study.yaml -o /shared/work
"""

from __future__ import annotations

import sys

from deepfere.cli import main

if __name__ == "__main__":
    # The stage finds the cluster through RAY_ADDRESS, which Ray sets for its jobs.
    main(["reconstruct", *sys.argv[1:]])
