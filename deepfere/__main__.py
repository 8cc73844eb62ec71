"""``python -m deepfere``: the same as the command ``deepfere``."""

from deepfere.cli import main

if __name__ == "__main__":
    main()
