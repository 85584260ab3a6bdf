"""`python -m probsurgery`."""

from probsurgery.cli import main

if __name__ == "__main__":
    main()
