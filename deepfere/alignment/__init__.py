"""Finding the alignment: coarse search over flips and rotations, then refinement, with evidence."""
