"""Which layers of teacher and student belong together."""

from distill.curriculum import round_half_up
from distill.errors import UserError


def spread(count: int, among: list[int]) -> list[int]:
    """`count` of the layers at even depth fractions, the middles of equal parts.

    Example:
        >>> spread(1, list(range(30))), spread(3, list(range(30)))
        ([15], [5, 15, 25])
    """
    if count > len(among):
        raise UserError(
            f"model.routing.teacher_layers: {count} are more than the teacher's {len(among)} layers; lower it"
        )
    return [among[(2 * i + 1) * len(among) // (2 * count)] for i in range(count)]


def same_depth(layer: int, depth: int, other_depth: int) -> int:
    """The layer of a model with `other_depth` layers that lies at the same fraction of its depth.

    Example:
        >>> same_depth(15, 30, 10), same_depth(0, 30, 10)
        (4, 0)
    """
    return max(0, round_half_up((layer + 1) / depth * other_depth) - 1)


def check_layers(key: str, layers: list[int], depth: int) -> None:
    """Raises UserError unless the indices are layers of a model with `depth` of them, the teacher's distinct."""
    for index in layers:
        if not 0 <= index < depth:
            raise UserError(f"{key}: {index} is not a layer; the model has layers 0 to {depth - 1}")
    if key.endswith("teacher_layers") and len(set(layers)) < len(layers):
        raise UserError(f"{key}: {layers} names a layer twice; name each once")
