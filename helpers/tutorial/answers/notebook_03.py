"""The answers to the exercises of notebook 03."""

from helpers.tutorial.exercises import Judge, Value

EXERCISES: dict[str, Judge] = {
    "03-standard-error": Value(
        0.27, tolerance=0.005, mistakes={0.0027: "That is a share. Give it in percentage points."}
    ),
}
