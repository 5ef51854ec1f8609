"""`python -m helpers`: the case study from the command line."""

from helpers.tutorial.commands import main

if __name__ == "__main__":
    main()
