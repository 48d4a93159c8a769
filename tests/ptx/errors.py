"""What the emulator raises."""


class Unknown(Exception):
    """An instruction, a form of one, or other PTX that the emulator does not execute."""


class Fault(Exception):
    """An error of a kernel, which a GPU would not report or would show as a wrong result only."""


class Races(Fault):
    """Data races, found in a launch that came to its end."""
