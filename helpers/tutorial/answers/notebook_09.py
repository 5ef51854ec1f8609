"""The answers to the exercises of notebook 09."""

from helpers.tutorial.exercises import Judge, Value

EXERCISES: dict[str, Judge] = {
    "09-saturation": Value(
        250, mistakes={2000: "Those are images per second. Each request has eight."}
    ),
}
