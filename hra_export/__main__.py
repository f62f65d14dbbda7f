"""`python -m hra_export` is the command line."""

from hra_export.cli import main

if __name__ == "__main__":
    main()
