"""The answers to the exercises of notebook 07."""

from helpers.tutorial.exercises import Judge, Value

EXERCISES: dict[str, Judge] = {
    "07-amdahl": Value(4 / 3, tolerance=0.01, mistakes={1.5: "Add the times, not the factors."}),
}
