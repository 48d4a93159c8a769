"""Kernels that Triton compiles: right ones give what they should under every schedule, and wrong ones are caught."""

import re
from itertools import product

import pytest

from .launches import outcomes

pytestmark = pytest.mark.kernels
SCHEDULES = {
    "": {}, " lockstep": {"lockstep": True}, " seed 1": {"seed": 1}, " seed 2": {"seed": 2},
    " seed 3 lockstep": {"seed": 3, "lockstep": True},
}  # fmt: skip
TWO = (" lockstep", " seed 1")


def under(schedules, name: str, chip: int, call: str, **arguments) -> dict[str, tuple]:
    """Returns a case under each of these schedules."""
    extra = arguments.pop("options", {})
    return {f"{name}{one}": (chip, call, arguments | {"options": SCHEDULES[one] | extra}) for one in schedules}


RIGHT = {}
for chip, schedules in ((80, SCHEDULES), (90, TWO)):
    for call in ("add", "softmax", "pair", "last", "flip"):
        RIGHT |= under(schedules, f"{call} {chip}", chip, call)
RIGHT |= under(SCHEDULES, "flip in a warp 80", 80, "flip", warp=True, barrier=False)

WRONG = {}  # with what the error has to be
for name, error, call, arguments in (
    ("no mask", "Fault: out of bounds: ", "add", {"mask": False}),
    ("no barrier", r"Races: (?s:.*)race in global \d memory \(cta\)", "flip", {"barrier": False}),
    ("lanes", r"Races: (?s:.*)\(warp\)", "flip", {"warp": True, "barrier": False, "options": {"races": "warp"}}),
    ("relaxed", r"Races: (?s:.*)\(grid\)", "last", {"sem": "relaxed"}),
    ("acquire alone", r"Races: (?s:.*)\(grid\)", "last", {"sem": "acquire"}),
    ("release alone", r"Races: (?s:.*)\(grid\)", "last", {"sem": "release"}),
    ("one place", r"Races: (?s:.*)write-write race(?s:.*)\(grid\)", "same_place", {}),
    ("waits", "Fault: deadlock", "spin", {"options": {"most_polls": 500}}),
    ("no stores", "Fault: reads shared memory that", "edited", {"pattern": r".*st\.shared.*", "new": ""}),
    ("unknown", "Unknown: bar.foo", "edited", {"pattern": r"bar\.sync", "new": "bar.foo"}),
    ("no address", "Fault: ", "edited", {"pattern": r".*ld\.param\.[bu]64.*", "new": ""}),
):  # fmt: skip
    WRONG |= {key: (case, error) for key, case in under(TWO, name, 80, call, **arguments).items()}

TILES = ((16, 16, 32, 1, 1), (32, 32, 32, 4, 2), (64, 64, 32, 4, 3), (64, 32, 64, 8, 1), (128, 64, 32, 4, 3))
PRODUCTS = {
    f"{dtype} {tile}{' transposed' * transposed} {chip}{schedule}": (
        chip, "product",
        {"dtype": dtype, "tile": tile, "transposed": transposed, "options": SCHEDULES[schedule]},
    )
    for dtype, tile, transposed, chip, schedule in product(
        ("bfloat16", "float16", "float32"), TILES, (False, True), (80, 90), TWO
    )
}  # fmt: skip
QUICK = [
    f"{dtype} {tile}{' transposed' * transposed} {chip} lockstep"
    for chip, tile in ((80, TILES[1]), (90, TILES[2]))
    for dtype, transposed in (("bfloat16", False), ("float16", True), ("float32", False))
]
CASES = RIGHT | {name: case for name, (case, _) in WRONG.items()} | PRODUCTS
KINDS = ("again", "prepared")
CASES |= {"settings": (90, "settings", {})} | {name: (80, name, {"options": {"raise_races": False}}) for name in KINDS}


@pytest.fixture(scope="module")
def outcome(request):
    """What came of each case whose test runs: all run in one process."""
    params = [getattr(item, "callspec", None) and item.callspec.params for item in request.session.items]
    wanted = {one["name"] for one in params if one and one.get("name") in CASES} | {"settings", *KINDS}
    if wanted & set(RIGHT):  # whose bits are compared
        wanted |= set(RIGHT)
    names = [name for name in CASES if name in wanted]
    return dict(zip(names, outcomes([CASES[name] for name in names]), strict=True))


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels(outcome, name):
    result = outcome[name]
    assert "error" not in result, result
    assert result["right"] and not result["races"] and not result["notes"]


@pytest.mark.parametrize("name", [name for name in RIGHT if name.endswith(" lockstep")])
def test_all_schedules_give_the_same_bits(outcome, name):
    name = name.removesuffix(" lockstep")
    bits = [outcome[name + schedule]["bits"] for schedule in SCHEDULES if name + schedule in outcome]
    assert bits[0] is not None and all(one == bits[0] for one in bits)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels(outcome, name):
    result, expected = outcome[name], WRONG[name][1]
    found = f"{result.get('error')}: {result.get('text')}"
    assert re.match(expected, found), found


@pytest.mark.parametrize(
    "name", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in PRODUCTS]
)
def test_products(outcome, name):
    """Triton 3.6 and earlier let wgmma read what cp.async wrote without a fence, which is noted."""
    result, (chip, _, arguments) = outcome[name], PRODUCTS[name]
    assert "error" not in result, result
    assert result["right"] and not result["races"] and set(result["notes"]) <= {"copy-unfenced read"}
    large = arguments["tile"][0] >= 64 and arguments["tile"][3] >= 4
    assert result["tensor_cores"] == ["wgmma" if chip == 90 and large else "mma"]


def test_the_driver_is_what_the_library_sees(outcome):
    assert outcome["settings"] == {"emulated": 90, "shared": 232448, "arch": 90}


@pytest.mark.parametrize("kinds", KINDS)
def test_what_was_compiled_is_launched_again_for_arguments_of_its_kind_alone(outcome, kinds):
    """Dtypes, addresses and integers that are a multiple of 16 or not, 1, and options; and constants made before."""
    result = outcome[kinds]
    assert "error" not in result, result
    assert result["right"] and result["runs"] == result["kinds"]


def test_a_driver_refuses_what_it_cannot_do(monkeypatch):
    from .driver import Driver

    with pytest.raises(ValueError, match="no such chip: 70"):
        Driver(70)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        Driver(80).activate()
