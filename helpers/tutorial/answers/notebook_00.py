"""The answers to the exercises of notebook 00."""

from helpers.tutorial.exercises import Judge, Value

EXERCISES: dict[str, Judge] = {
    "00-patterns": Value(
        6,
        mistakes={
            4: "That counts the positions of one survivor. Two of them are placed together.",
            12: "The order of the two does not matter, so each pair was counted twice.",
        },
    ),
}
