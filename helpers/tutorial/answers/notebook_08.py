"""The answers to the exercises of notebook 08."""

from helpers.tutorial.exercises import Judge, Value

EXERCISES: dict[str, Judge] = {
    "08-int8-bytes": Value(
        0.3125,
        tolerance=1e-6,
        mistakes={
            0.625: "That is the share of the dense INT8 bytes. FP16 takes two bytes a number."
        },
    ),
}
