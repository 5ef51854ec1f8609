"""`python -m helpers`: the case study, and tools for any model, from the command line."""

from helpers.tutorial.commands import main

if __name__ == "__main__":
    main()
