"""The answers to the exercises of notebook 01."""

from helpers.tutorial.exercises import Function, Judge, Value


def macs(outputs: int, inputs: int, kernel: int, pixels: int, groups: int = 1) -> float:
    return outputs * inputs // groups * kernel**2 * pixels


def _groups_ignored(outputs: int, inputs: int, kernel: int, pixels: int, groups: int = 1) -> float:
    return outputs * inputs * kernel**2 * pixels


def _groups_twice(outputs: int, inputs: int, kernel: int, pixels: int, groups: int = 1) -> float:
    return outputs * inputs / groups**2 * kernel**2 * pixels


def _flat_kernel(outputs: int, inputs: int, kernel: int, pixels: int, groups: int = 1) -> float:
    return outputs * inputs / groups * kernel * pixels


def _one_pixel(outputs: int, inputs: int, kernel: int, pixels: int, groups: int = 1) -> float:
    return outputs * inputs / groups * kernel**2


EXERCISES: dict[str, Judge] = {
    "01-amdahl": Value(
        1.78,
        tolerance=0.005,
        mistakes={
            2: "That would be so if all the work took half the time.",
            0.56: "That is the new time as a share of the old. How many times faster is it?",
        },
    ),
    "01-macs": Function(
        macs,
        [(8, 64, 1, 196), (32, 32, 3, 49, 8), (64, 1, 3, 784), (256, 256, 3, 3136, 32)],
        mistakes={
            _groups_ignored: "In a grouped convolution an output reads the inputs of its own "
            "group only.",
            _groups_twice: "Every output is still computed. Only the inputs that it reads become "
            "fewer.",
            _flat_kernel: "`kernel` is the width of a square of weights.",
            _one_pixel: "Each weight is used once at every pixel of the output.",
        },
    ),
}
