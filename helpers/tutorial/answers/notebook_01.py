"""The answers to the exercises of notebook 01."""

from helpers.tutorial.exercises import Judge, Value

EXERCISES: dict[str, Judge] = {
    "01-amdahl": Value(1.78, tolerance=0.005),
}
