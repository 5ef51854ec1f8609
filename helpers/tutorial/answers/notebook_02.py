"""The answers to the exercises of notebook 02."""

from helpers.tutorial.exercises import Judge, Value

EXERCISES: dict[str, Judge] = {
    "02-bytes": Value(
        0.625,
        tolerance=0.001,
        mistakes={0.5: "That counts the kept values alone. Their positions take two bits each."},
    ),
}
