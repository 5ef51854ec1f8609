"""The answers to the exercises of notebook 06."""

from helpers.tutorial.exercises import Judge, Value

EXERCISES: dict[str, Judge] = {
    "06-images-per-second": Value(
        1600, mistakes={50: "Those are batches per second. Each has 32 images."}
    ),
}
