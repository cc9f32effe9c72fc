"""The camera by which `one_step.py` paints edges: that of the pictures that it learns from."""

PROJECTION = (
    (0.3857506097278885, 1.1140993767763763, -0.23720899700696868, 9.386413225301299),
    (0.18991268812917322, -0.16519974459229358, -1.5209793970942878, 9.386413225301297),
    (-0.6641780891550174, 0.5777499743333455, -0.47441799401393736, 18.772826450602597),
)


def projection() -> tuple[tuple[float, ...], ...]:
    """Return the camera's matrix (3, 4): x, y and 1 in a picture, times the depth, of X, Y, Z and 1 in the scene.

    x, y: fractions of width and height; X, Y, Z and the depth: in radii, Z above the ground.
    """
    return PROJECTION
