"""The answers to the exercises of notebook 00."""

from helpers.tutorial.exercises import Function, Judge, Value


def is_2to4_row(row: list[float]) -> bool:
    fours = [row[start : start + 4] for start in range(0, len(row), 4)]
    return all(four.count(0) >= 2 for four in fours)


def _half_of_all(row: list[float]) -> bool:
    return 2 * row.count(0) >= len(row)


def _exactly_two(row: list[float]) -> bool:
    return all(row[start : start + 4].count(0) == 2 for start in range(0, len(row), 4))


def _any_four_neighbours(row: list[float]) -> bool:
    return all(row[start : start + 4].count(0) >= 2 for start in range(len(row) - 3))


def _first_group(row: list[float]) -> bool:
    return row[:4].count(0) >= 2


EXERCISES: dict[str, Judge] = {
    "00-patterns": Value(
        6,
        mistakes={
            4: "That counts the positions of one survivor. Two of them are placed together.",
            12: "The order of the two does not matter, so each pair was counted twice.",
            8: "Each of the two has four positions, but they cannot share one.",
        },
    ),
    "00-is-2to4": Function(
        is_2to4_row,
        [
            ([0, 1.5, 0, -2],),
            ([1, 0, 2, 3],),
            ([0, 0, 0, 0, 1, 2, 3, 4],),
            ([0, 0, 0, 1, 2, 0, 0, 3],),
            ([0, 0, 1, 2, 3, 4, 0, 0],),
            ([0, 0, 1, 2, 3, 4, 5, 0, 0, 0, 1, 1],),
        ],
        mistakes={
            _half_of_all: "It accepts [0, 0, 0, 0, 1, 2, 3, 4]. Each group counts by itself.",
            _exactly_two: "A group with three zeros is 2:4 as well: at least two must be zero.",
            _any_four_neighbours: "It refuses [0, 0, 1, 2, 3, 4, 0, 0]. A group begins at every "
            "fourth number only.",
            _first_group: "It looks at the first group only.",
        },
    ),
}
