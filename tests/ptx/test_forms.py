"""Every instruction that the emulator executes has a test against a reference."""

from . import test_faults, test_memory, test_tensor, test_warps
from .forms import ARITHMETIC, CONTROL, CONVERSIONS, EFFECTS, FORMS, expand, opcodes


def test_every_form_has_a_test():
    """Arithmetic is tested by its own list; the rest stands in the COVERED of a module."""
    covered = [form for module in (test_memory, test_tensor, test_warps, test_faults) for form in module.COVERED]
    assert not set(FORMS) - set(ARITHMETIC) - set(CONVERSIONS) - set(covered)
    assert set(EFFECTS) | set(CONTROL) == set(covered)


def test_no_opcode_stands_in_two_forms():
    assert len(opcodes()) == sum(len(expand(form)) for form in FORMS)


def test_expansion():
    assert expand("a") == ["a"]
    assert expand("<a b>.c") == ["a.c", "b.c"]
    assert expand("a[.b].c") == ["a.b.c", "a.c"]
    assert sorted(expand("a[.<b c>].<d e>")) == ["a.b.d", "a.b.e", "a.c.d", "a.c.e", "a.d", "a.e"]
