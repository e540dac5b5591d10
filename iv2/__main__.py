"""`python -m iv2` is `iv2`."""

from iv2.cli import main

if __name__ == "__main__":
    main()
